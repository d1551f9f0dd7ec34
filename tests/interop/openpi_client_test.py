"""The stock openpi-client, unmodified in an environment of its own, against the running engine."""

from pathlib import Path
from typing import Any

import pytest
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy_configs import load_policy_config

from tests.interop.robots import robots
from tests.support import Engine


@pytest.fixture
def direct(engine: Engine, observation_with_noise: tuple[dict[str, Any], Path]) -> str:
    """The actions of a call without any server, as hexadecimal bytes."""
    action = engine.settings["action"]
    config = load_policy_config(action["model_config_name"])
    policy = load_policy(config, Path(action["checkpoint_dir"]), device="cpu", precision="float32", max_batch_size=2)
    observation = dict(observation_with_noise[0])
    return policy.infer(observation, noise=observation.pop("noise"))["actions"].tobytes().hex()


def test_actions_are_those_of_a_direct_call(engine, stock_python, observation_with_noise, direct):
    with robots(stock_python, ["policy"], engine.websocket_port(), observation_with_noise[1], 3) as (robot,):
        result = robot.result()
    assert result["metadata"] == {}  # DROID's configurations have none
    assert result["dtype"] == "float64"
    assert result["actions"] == [direct] * 3
    first, later = {"server_timing": ["infer_ms"]}, {"server_timing": ["infer_ms", "prev_total_ms"]}
    assert result["keys"] == [{"policy_timing": ["infer_ms"], **timing} for timing in (first, later, later)]


def test_chunks_go_through_the_action_chunk_broker(engine, stock_python, observation_with_noise, direct):
    with robots(stock_python, ["broker"], engine.websocket_port(), observation_with_noise[1], 2) as (robot,):
        assert robot.result()["actions"] == [direct] * 2


def test_a_refused_request_is_a_readable_error(engine, stock_python, observation_with_noise):
    with robots(stock_python, ["bad_prompt"], engine.websocket_port(), observation_with_noise[1], 1) as (robot,):
        error = robot.result()["error"]
    assert error == "Error in inference server:\nINVALID_ARGUMENT: prompt: a int; a string is expected"


def test_of_eight_robots_three_misbehave_and_the_others_lose_nothing(
    engine, stock_python, observation_with_noise, direct
):
    calls, misbehaving = 30, ["garbage", "deaf", "vanish"]
    roles, port = ["policy"] * 5 + misbehaving, engine.websocket_port()
    with robots(stock_python, roles, port, observation_with_noise[1], calls) as started:
        for robot in started[:5]:
            assert robot.result()["actions"] == [direct] * calls
        for robot in started[5:]:
            robot.tell()
        garbage, deaf, vanish = (robot.result() for robot in started[5:])
    assert garbage["sent"] > 0
    assert deaf["sent"] > 0
    assert vanish["gone"] > 0
