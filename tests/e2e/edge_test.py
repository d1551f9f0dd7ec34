"""QUIC beside the other transports: `serve` runs the edge; FlashTransportPolicy, or a sidecar, brings a robot to it."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openpi_flash_cli.scene import camera_picture
from openpi_flash_cli.tiny import TinyPolicy
from openpi_flash_client import AuthenticationError, FlashTransportPolicy, GrpcPolicy, PolicyError, PolicyTimeoutError

from tests.support import (
    READY,
    Engine,
    ask,
    running_engine,
    sidecar,
    start_engine,
    start_engine_again,
    transport_binary,
)


@pytest.fixture(scope="module")
def binary() -> Path:
    return transport_binary()


@pytest.fixture(scope="module")
def engine(tiny_policies: dict[str, TinyPolicy], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("edge")
    with running_engine(
        tiny_policies["jax"],
        directory,
        slots=("action", "planner"),
        planner={"max_batch_size": 1, "timeout_ms": 30_000},
        max_batch_size=1,
        warm_up={"prompt_buckets": [64, 128]},
    ) as engine:
        yield engine


def pictures(height: int, width: int, arrange: Any = np.asarray) -> dict[str, np.ndarray]:
    names = ("observation/exterior_image_1_left", "observation/wrist_image_left")
    views = enumerate(names)
    return {name: arrange(camera_picture(view, 0, height=height, width=width)) for view, name in views}


@pytest.mark.parametrize(
    "views",
    [
        pytest.param(pictures(224, 224), id="model's size"),
        pytest.param(pictures(480, 640), id="camera's size"),
        pytest.param(pictures(480, 640, lambda view: view.transpose(2, 0, 1)), id="channels first"),
        pytest.param(pictures(224, 224, lambda view: view.transpose(2, 0, 1).copy()), id="channels first in memory"),
        pytest.param(pictures(240, 320, lambda view: (view / 255).astype(np.float32)), id="floats"),
    ],
)
def test_the_same_actions_on_every_transport(engine, binary, observation, views):
    observation |= views
    with GrpcPolicy("127.0.0.1", engine.grpc_port) as policy:
        policy._cameras = {}  # as without the extension: arrays as they are, and the server prepares them
        expected = policy.infer(observation, seed=7)
    with GrpcPolicy("127.0.0.1", engine.grpc_port) as policy:
        over_grpc = policy.infer(observation, seed=7)
    with engine.over_websocket() as connection:
        over_websocket = ask(connection, {**observation, "seed": 7})
    with sidecar(binary, engine) as port, GrpcPolicy("127.0.0.1", port) as policy:
        through_sidecar = policy.infer(observation, seed=7)
    with engine.over_quic() as policy:
        over_quic = policy.infer(observation, seed=7)
        awaited = asyncio.run(policy.infer_async(observation, seed=7))
    for answer in (over_grpc, over_websocket, through_sidecar, over_quic, awaited):
        assert answer["actions"].tobytes() == expected["actions"].tobytes()
        for entry in ("text", "status"):  # of some pictures the tiny planner writes nothing, and has failed
            assert answer["subtask"][entry] == expected["subtask"][entry]


def test_what_is_not_right_is_said_by_the_server(engine, binary, observation):
    messages = []
    with sidecar(binary, engine) as port, GrpcPolicy("127.0.0.1", port) as through_sidecar, engine.over_quic() as quic:
        for policy in (through_sidecar, quic):
            assert policy.get_server_metadata()["server_mode"] == "combined"
            policy.reset()
            for name, value in {"prompt": np.zeros(3), "observation/wrist_image_left": np.full((9, 9, 3), 2.0)}.items():
                with pytest.raises(PolicyError, match=name) as caught:
                    policy.infer({**observation, name: value})
                messages.append(caught.value.message)
    assert messages[:2] == messages[2:]


def test_a_sidecar_on_a_unix_socket(engine, binary, observation, tmp_path):
    server = f"127.0.0.1:{engine.quic_port}"
    socket = tmp_path / "policy.sock"
    command = [binary, "client", server, "--listen", f"unix:{socket}", "--fingerprint", engine.fingerprint()]
    process = subprocess.Popen(command)
    try:
        with GrpcPolicy(unix_socket=socket) as policy:
            assert policy.infer(observation, seed=7)["actions"].shape[0] > 1
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_the_planners_own_port(engine, binary, observation):
    with sidecar(binary, engine, "planner") as port, GrpcPolicy("127.0.0.1", port) as policy:
        through_sidecar = policy.infer(observation)
    port = engine.settings["planner_transport"]["quic_port"]
    with FlashTransportPolicy("127.0.0.1", port, fingerprint=engine.fingerprint()) as policy:
        over_quic = policy.infer(observation)
    for answer in (through_sidecar, over_quic):
        assert "actions" not in answer
        assert answer["subtask"]["text"]


def test_a_robot_survives_the_edge(engine, binary, observation):
    with sidecar(binary, engine) as port, GrpcPolicy("127.0.0.1", port) as policy, engine.over_quic() as quic:
        before = policy.infer(observation, seed=7)["actions"]
        quic.infer(observation)
        old = engine.child_pid("openpi-flash-transport")
        os.kill(old, signal.SIGKILL)
        engine.wait_for("edge.*ended with signal SIGKILL")
        for robot in (policy, quic):
            after = robot.infer(observation, seed=7, timeout_s=30)["actions"]
            assert before.tobytes() == after.tobytes()
        assert engine.child_pid("openpi-flash-transport") != old


def test_another_fingerprint_is_not_trusted(engine, binary, observation):
    pin = "00" * 32
    with (
        sidecar(binary, engine, pin=pin) as port,
        pytest.raises(PolicyError, match=r"fingerprint|certificate"),
        GrpcPolicy("127.0.0.1", port) as policy,
    ):
        policy.infer(observation)
    with pytest.raises(AuthenticationError, match="fingerprint"):
        FlashTransportPolicy("127.0.0.1", engine.quic_port, fingerprint=pin)


def test_a_certificate_that_nobody_signed_is_not_trusted(engine):
    with pytest.raises(AuthenticationError, match="UnknownIssuer"):
        FlashTransportPolicy("127.0.0.1", engine.quic_port)


def test_the_time_of_a_call(engine):
    command = [sys.executable, "-m", "openpi_flash_cli", "test", "quic", "127.0.0.1", "--port", str(engine.quic_port)]
    done = subprocess.run(
        [*command, "--fingerprint", engine.fingerprint()], capture_output=True, text=True, check=True, timeout=120
    )
    assert "client round trip" in done.stdout
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert refused.returncode == 1
    assert refused.stderr.startswith("openpi-flash test: 127.0.0.1:")
    assert "UnknownIssuer" in refused.stderr


def test_pictures_as_jpeg_and_a_server_that_is_started_again(tiny_policies, tmp_path, observation):
    """The same server with another wish: robots that were there before send pictures as it now wants them."""
    observation |= pictures(480, 640)
    engine = start_engine(tiny_policies["jax"], tmp_path)
    try:
        engine.wait_for(READY)
        with engine.over_quic(timeout_s=60) as policy:
            lossless = policy.infer(observation, seed=7)["actions"]
            assert engine.stop() == 0
            with pytest.raises(PolicyTimeoutError):
                policy.infer(observation, timeout_s=0.3)
            engine = start_engine_again(engine, {"images": {"encoding": "jpeg", "quality": 95}})
            engine.wait_for(READY)
            policy.infer(observation)
            jpeg = policy.infer(observation, seed=7)["actions"]
            encodings = {spec["encoding"] for spec in policy.get_server_metadata()["image_specs"]}
            assert encodings == {"IMAGE_ENCODING_JPEG"}
            with GrpcPolicy("127.0.0.1", engine.grpc_port) as over_grpc:
                assert over_grpc.infer(observation, seed=7)["actions"].tobytes() == jpeg.tobytes()
                over_grpc._cameras = {}
                assert over_grpc.infer(observation, seed=7)["actions"].tobytes() == lossless.tobytes()
        difference = np.abs(jpeg - lossless)
        assert 0 < difference.max() < 0.1
        assert engine.stop() == 0
    finally:
        engine.process.kill()


def test_several_robots_in_one_event_loop_and_in_threads(engine, observation):
    async def drive(policy: FlashTransportPolicy) -> list[dict[str, Any]]:
        return await asyncio.gather(*(policy.infer_async(observation, seed=seed) for seed in range(4)))

    with engine.over_quic(timeout_s=60) as policy:
        awaited = asyncio.run(drive(policy))
        in_threads: dict[int, Any] = {}

        def ask(seed: int) -> None:
            in_threads[seed] = policy.infer(observation, seed=seed)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed, answer in enumerate(awaited):
        assert answer["actions"].tobytes() == in_threads[seed]["actions"].tobytes()


def test_a_program_that_is_not_there_is_said(tiny_policies: dict[str, TinyPolicy], tmp_path: Any):
    environment = {"OPENPI_FLASH_TRANSPORT_BINARY": "/nowhere/edge"}
    engine = start_engine(tiny_policies["jax"], tmp_path, environment=environment)
    assert engine.process.wait(60) == 1
    engine_log = "\n".join(engine.log)
    assert "OPENPI_FLASH_TRANSPORT_BINARY: /nowhere/edge: no program that can be run" in engine_log
    assert "Traceback" not in engine_log
