"""The stock openpi-client, unmodified in an environment of its own, against the running engine."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy_configs import load_policy_config

from tests.support import Engine


@pytest.fixture(scope="session")
def stock_python() -> Path:
    """The interpreter of an environment with openpi-client and nothing of openpi-flash."""
    python = Path(__file__).parents[2] / ".cache/openpi-client-env/bin/python"
    assert python.exists(), "make .cache/openpi-client-env/.done, which `make test` does, too"
    return python


@pytest.fixture
def observation_with_noise(observation: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """An observation whose actions are one and the same each time, and a file of it."""
    noise = np.random.default_rng(7).standard_normal((15, 32), dtype=np.float32)
    path = tmp_path / "observation.npz"
    np.savez(path, **observation, noise=noise)
    return {**observation, "noise": noise}, path


@pytest.fixture
def direct(engine: Engine, observation_with_noise: tuple[dict[str, Any], Path]) -> str:
    """The actions of a call without any server, as hexadecimal bytes."""
    action = engine.settings["action"]
    config = load_policy_config(action["model_config_name"])
    policy = load_policy(config, Path(action["checkpoint_dir"]), device="cpu", precision="float32", max_batch_size=2)
    observation = dict(observation_with_noise[0])
    return policy.infer(observation, noise=observation.pop("noise"))["actions"].tobytes().hex()


class Robot:
    """A stock robot in a process of its own, connected and waiting."""

    def __init__(self, python: Path, role: str, port: int, observation: Path, calls: int) -> None:
        script = Path(__file__).with_name("stock_robot.py")
        self.process = subprocess.Popen(
            [python, "-I", script, role, str(port), observation, str(calls)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_connected(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def tell(self) -> None:
        """The word to begin; the second time, to stop."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        output, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0
        return json.loads(output)


@contextmanager
def robots(python: Path, roles: list[str], engine: Engine, observation: Path, calls: int) -> Iterator[list[Robot]]:
    started = [Robot(python, role, engine.websocket_port, observation, calls) for role in roles]
    try:
        for robot in started:
            robot.wait_connected()
        for robot in started:
            robot.tell()
        yield started
    finally:
        for robot in started:
            robot.process.kill()
            robot.process.wait()


def test_actions_are_those_of_a_direct_call(engine, stock_python, observation_with_noise, direct):
    with robots(stock_python, ["policy"], engine, observation_with_noise[1], 3) as (robot,):
        result = robot.result()
    assert result["metadata"] == {}  # DROID's configurations have none
    assert result["dtype"] == "float64"
    assert result["actions"] == [direct] * 3
    first, later = {"server_timing": ["infer_ms"]}, {"server_timing": ["infer_ms", "prev_total_ms"]}
    assert result["keys"] == [{"policy_timing": ["infer_ms"], **timing} for timing in (first, later, later)]


def test_chunks_go_through_the_action_chunk_broker(engine, stock_python, observation_with_noise, direct):
    with robots(stock_python, ["broker"], engine, observation_with_noise[1], 2) as (robot,):
        assert robot.result()["actions"] == [direct] * 2


def test_a_refused_request_is_a_readable_error(engine, stock_python, observation_with_noise):
    with robots(stock_python, ["bad_prompt"], engine, observation_with_noise[1], 1) as (robot,):
        error = robot.result()["error"]
    assert error == "Error in inference server:\nINVALID_ARGUMENT: prompt: a int; a string is expected"


def test_of_eight_robots_three_misbehave_and_the_others_lose_nothing(
    engine, stock_python, observation_with_noise, direct
):
    calls, misbehaving = 30, ["garbage", "deaf", "vanish"]
    with robots(stock_python, ["policy"] * 5 + misbehaving, engine, observation_with_noise[1], calls) as started:
        for robot in started[:5]:
            assert robot.result()["actions"] == [direct] * calls
        for robot in started[5:]:
            robot.tell()
        garbage, deaf, vanish = (robot.result() for robot in started[5:])
    assert garbage["sent"] > 0
    assert deaf["sent"] > 0
    assert vanish["gone"] > 0
