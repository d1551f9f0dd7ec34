"""QUIC beside the other transports: `serve` runs the edge, and a sidecar brings a robot's gRPC to it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openpi_flash_cli.tiny import TinyPolicy
from openpi_flash_client import GrpcPolicy, PolicyError
from openpi_flash_common import openpi_msgpack
from websockets.sync.client import connect

from tests.support import READY, Engine, sidecar, start_engine, transport_binary


@pytest.fixture(scope="module")
def binary() -> Path:
    return transport_binary()


@pytest.fixture(scope="module")
def engine(
    tiny_policies: dict[str, TinyPolicy], tmp_path_factory: pytest.TempPathFactory, binary: Path
) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("edge")
    environment = {"OPENPI_FLASH_TRANSPORT_BINARY": str(binary), "OPENPI_FLASH_STATE_DIR": str(directory / "state")}
    engine = start_engine(
        tiny_policies["jax"],
        directory,
        slots=("action", "planner"),
        planner={"max_batch_size": 1, "timeout_ms": 30_000},
        environment=environment,
        max_batch_size=1,
        warm_up={"prompt_buckets": [64, 128]},
    )
    try:
        engine.wait_for(READY)
        yield engine
        assert engine.stop() == 0
    finally:
        engine.process.kill()


def test_the_same_actions_on_every_transport(engine, binary, observation):
    with GrpcPolicy("127.0.0.1", engine.grpc_port) as policy:
        expected = policy.infer(observation, seed=7)
    with connect(f"ws://127.0.0.1:{engine.websocket_port()}", compression=None, max_size=None) as connection:
        connection.recv(60)
        connection.send(openpi_msgpack.packb({**observation, "seed": 7}))
        over_websocket = openpi_msgpack.unpackb(connection.recv(60))
    with sidecar(binary, engine) as port, GrpcPolicy("127.0.0.1", port) as policy:
        over_quic = policy.infer(observation, seed=7)
        assert policy.get_server_metadata()["server_mode"] == "combined"
        policy.reset()
        with pytest.raises(PolicyError, match="prompt"):
            policy.infer({**observation, "prompt": np.zeros(3)})
    for answer in (over_websocket, over_quic):
        assert answer["actions"].tobytes() == expected["actions"].tobytes()
        assert answer["subtask"]["text"] == expected["subtask"]["text"]
        assert answer["subtask"]["status"] == "fresh"


def test_the_planners_own_port(engine, binary, observation):
    with sidecar(binary, engine, "planner") as port, GrpcPolicy("127.0.0.1", port) as policy:
        answer = policy.infer(observation)
    assert "actions" not in answer
    assert answer["subtask"]["text"]


def test_a_robot_survives_the_edge(engine, binary, observation):
    with sidecar(binary, engine) as port, GrpcPolicy("127.0.0.1", port) as policy:
        before = policy.infer(observation, seed=7)["actions"]
        old = engine.child_pid("openpi-flash-transport")
        os.kill(old, signal.SIGKILL)
        engine.wait_for("edge.*ended with signal SIGKILL")
        after = policy.infer(observation, seed=7, timeout_s=30)["actions"]
        assert engine.child_pid("openpi-flash-transport") != old
    assert before.tobytes() == after.tobytes()


def test_another_fingerprint_is_not_trusted(engine, binary, observation):
    pin = "00" * 32
    with (
        sidecar(binary, engine, pin=pin) as port,
        pytest.raises(PolicyError, match=r"fingerprint|certificate"),
        GrpcPolicy("127.0.0.1", port, connect_timeout_s=3) as policy,
    ):
        policy.infer(observation)


def test_a_program_that_is_not_there_is_said(tiny_policies: dict[str, TinyPolicy], tmp_path: Any):
    environment = {"OPENPI_FLASH_TRANSPORT_BINARY": "/nowhere/edge"}
    engine = start_engine(tiny_policies["jax"], tmp_path, environment=environment)
    assert engine.process.wait(60) == 1
    engine_log = "\n".join(engine.log)
    assert "OPENPI_FLASH_TRANSPORT_BINARY: /nowhere/edge: no program that can be run" in engine_log
    assert "Traceback" not in engine_log
