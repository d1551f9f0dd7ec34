"""The stock openpi-client against servers with a planner: every mode on every port in every cadence, and a planner that
is killed."""

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openpi_flash_cli.tiny import TinyPolicy
from openpi_flash_client import GrpcPolicy, PolicyError

from tests.interop.robots import robots
from tests.support import Engine, running_engine

ACTIONS = [15, 8]
ONE_SHAPE = {"max_batch_size": 1, "warm_up": {"prompt_buckets": [64, 128, 200]}}
CADENCES: tuple[Any, ...] = ("every_request", {"interval_ms": 300}, "background")
FRESH_OR_REUSED = {"every_request": ["fresh"] * 3, "background": ["pending", "reused"]}


@pytest.fixture(scope="module")
def combined(tiny_policies: dict[str, TinyPolicy], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with running_engine(
        tiny_policies["jax"],
        tmp_path_factory.mktemp("combined"),
        slots=("action", "planner"),
        planner={"max_batch_size": 1, "timeout_ms": 500},
        **ONE_SHAPE,
    ) as engine:
        yield engine


@pytest.fixture
def ask(stock_python: Path, observation_with_noise: tuple[dict[str, Any], Path]) -> Any:
    """Calls a port with one change of the observation after the other, and gives the answers."""

    def ask(port: int, *changes: dict[str, Any]) -> list[dict[str, Any]]:
        path = observation_with_noise[1]
        path.with_suffix(".json").write_text(json.dumps(changes))
        with robots(stock_python, ["requests"], port, path, 1) as (robot,):
            return robot.result()["answers"]

    return ask


def set_cadence(engine: Engine, cadence: Any) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{engine.admin_port}/config",
        method="PATCH",
        data=json.dumps({"cadence": cadence}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["cadence"] == cadence


def test_what_is_ready_is_said(combined):
    combined.wait_for(r"Service ready \(mode=combined, slots=\[action, planner\]\)")


@pytest.mark.parametrize("cadence", CADENCES, ids=str)
def test_every_mode_on_both_ports(combined, ask, cadence):
    set_cadence(combined, cadence)
    modes = [{}, {"mode": "default"}, {"mode": "action_only"}, {"mode": "subtask_only"}]
    default, again, action_only, subtask_only = ask(combined.websocket_port(), *modes)
    for answer in (default, again):
        assert answer["actions"] == ACTIONS
        assert {"text", "ms", "status"} <= answer["subtask"].keys()
    if cadence == "background":
        assert default["subtask"]["status"] == "pending"
        assert again["subtask"]["status"] in ("pending", "reused")
    else:
        assert default["subtask"]["status"] == "fresh", default["subtask"]
        assert again["subtask"]["status"] in ("fresh", "reused")
        assert default["subtask"]["text"]
    assert action_only["actions"] == ACTIONS
    assert "subtask" not in action_only
    for answer in (subtask_only, *ask(combined.websocket_port("planner"), {}, {"mode": "subtask_only"})):
        assert "actions" not in answer
        assert answer["subtask"]["text"]
        assert answer["subtask"]["ms"] > 0


def test_the_subtask_changes_the_actions(combined, stock_python, observation_with_noise):
    set_cadence(combined, "every_request")
    observation, _ = observation_with_noise
    with GrpcPolicy("127.0.0.1", combined.grpc_port) as policy:
        noise = observation["noise"]
        entries = {name: value for name, value in observation.items() if name != "noise"}
        first, again = (policy.infer(entries, noise=noise) for _ in range(2))
        alone = policy.infer(entries, noise=noise, mode="action_only")
        told = policy.infer(
            {**entries, "prompt": f"{entries['prompt']}. Subtask: {first['subtask']['text']}"},
            noise=noise,
            mode="action_only",
        )
    assert (first["actions"] == again["actions"]).all()
    assert (first["actions"] != alone["actions"]).any()
    assert (first["actions"] == told["actions"]).all()


@pytest.mark.parametrize("cadence", CADENCES, ids=str)
def test_a_planner_that_is_killed_costs_no_action(combined, stock_python, observation_with_noise, cadence):
    set_cadence(combined, cadence)
    port, path = combined.websocket_port(), observation_with_noise[1]
    good = ("fresh", "reused") if cadence != "every_request" else ("fresh",)
    with robots(stock_python, ["steady"], port, path, 1) as (robot,):
        while robot.answer()["subtask"]["status"] not in good:
            pass
        pid = combined.child_pid("openpi_flash_planner")
        os.kill(pid, signal.SIGSTOP)  # so that it dies with a request in its hands
        answers = [robot.answer() for _ in range(3)]
        os.kill(pid, signal.SIGKILL)
        while not answers[-1]["subtask"].get("error"):
            answers.append(robot.answer())
        while answers[-1]["subtask"].get("error") or answers[-1]["subtask"]["status"] not in good:
            answers.append(robot.answer())
        robot.tell()
        for answer in answers:
            assert answer["actions"] == ACTIONS
            assert answer["subtask"]["status"] in ("fresh", "reused", "failed", "pending")
    assert combined.child_pid("openpi_flash_planner") != pid


def test_a_planner_alone(tiny_policies, tmp_path, ask):
    ready = r"Service ready \(mode=planner_only, slots=\[planner\]\)"
    planner = {"slots": ("planner",), "planner": {"max_batch_size": 1}}
    with running_engine(tiny_policies["jax"], tmp_path, ready=ready, **planner) as engine:
        for answer in ask(engine.websocket_port("planner"), {}, {"mode": "default"}, {"mode": "subtask_only"}):
            assert "actions" not in answer
            assert answer["subtask"]["text"]
        with GrpcPolicy("127.0.0.1", engine.grpc_port) as policy:
            assert policy.get_server_metadata()["server_mode"] == "planner_only"
            with pytest.raises(PolicyError, match="action_only needs an action policy"):
                policy.infer({"prompt": "go"}, mode="action_only")
