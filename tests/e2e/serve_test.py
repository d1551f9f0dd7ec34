"""The whole engine as an operator runs it: the same actions on every transport, bad input, faults, restarts, stops."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.json_format import MessageToDict
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from openpi_flash.v1 import inference_pb2, policy_pb2_grpc
from openpi_flash_cli.tiny import TinyPolicy
from openpi_flash_client import GrpcPolicy, InvalidArgumentError, PolicyError
from openpi_flash_common import openpi_msgpack
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy_configs import load_policy_config
from websockets.exceptions import ConnectionClosed

from tests.support import READY, Engine, ask, running_engine, start_engine, stub_request

SEED = 7
IMAGE = "observation/exterior_image_1_left"
STATE = "observation/joint_position"


def actions_of(response: inference_pb2.InferResponse) -> bytes:
    return response.tensors["actions"].data


def test_every_transport_gives_the_bits_of_a_direct_call(engine: Engine, observation: dict[str, Any]):
    action = engine.settings["action"]
    config = load_policy_config(action["model_config_name"])
    policy = load_policy(config, Path(action["checkpoint_dir"]), device="cpu", precision="float32", max_batch_size=2)
    direct = policy.infer(observation, seed=SEED)["actions"]
    assert direct.shape == (15, 8)
    assert np.isfinite(direct).all()

    with GrpcPolicy("127.0.0.1", engine.grpc_port) as client:
        np.testing.assert_array_equal(client.infer(observation, seed=SEED)["actions"], direct)
        noise = np.random.default_rng(SEED).standard_normal((15, 32), dtype=np.float32)
        np.testing.assert_array_equal(client.infer(observation, noise=noise)["actions"], direct)
        assert not np.array_equal(client.infer(observation)["actions"], direct)
    unix_socket = engine.settings["action_transport"]["unix_socket_path"]
    with GrpcPolicy(unix_socket=unix_socket) as client:
        np.testing.assert_array_equal(client.infer(observation, seed=SEED)["actions"], direct)
    with engine.over_websocket() as connection:
        np.testing.assert_array_equal(ask(connection, observation | {"seed": SEED})["actions"], direct)
    with grpc.insecure_channel(f"127.0.0.1:{engine.grpc_port}") as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        assert actions_of(stub.Infer(stub_request(observation, SEED))) == direct.tobytes()
        answer = next(
            stub.InferStream(iter([inference_pb2.InferStreamRequest(request=stub_request(observation, SEED))]))
        )
        assert actions_of(answer.response) == direct.tobytes()


def test_timing_adds_up(engine: Engine, observation: dict[str, Any]):
    with GrpcPolicy("127.0.0.1", engine.grpc_port) as client:
        timing = client.infer(observation)["timing"]
    parts = [timing[f"{name}_ms"] for name in ("queue", "preprocess", "model", "postprocess")]
    assert timing["model_ms"] > 0
    assert all(part >= 0 for part in parts)
    assert sum(parts) <= timing["total_ms"]
    assert timing["batch_size"] == 1


def test_metadata_tells_what_to_send(engine: Engine):
    with GrpcPolicy("127.0.0.1", engine.grpc_port) as client:
        metadata = client.get_server_metadata()
    assert metadata["model_config_name"] == "pi05_droid_tiny"
    assert (metadata["action_horizon"], metadata["action_dim"], metadata["robot_action_dim"]) == (15, 32, 8)
    assert {spec["path"]: (spec["height"], spec["width"]) for spec in metadata["image_specs"]} == {
        IMAGE: (224, 224),
        "observation/wrist_image_left": (224, 224),
    }
    assert {spec["path"]: spec["shape"] for spec in metadata["tensor_specs"]} == {
        STATE: [7],
        "observation/gripper_position": [1],
    }


@pytest.mark.parametrize("service", ["PolicyService", "ActionService"])
def test_reflection_lists_describes_and_calls(engine: Engine, service: str):
    """What grpcurl does: it knows nothing but the address."""
    port = engine.grpc_port if service == "PolicyService" else engine.action_port
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert f"openpi_flash.v1.{service}" in database.get_services()
        assert "grpc.health.v1.Health" in database.get_services()
        pool = descriptor_pool.DescriptorPool(database)
        methods = pool.FindServiceByName(f"openpi_flash.v1.{service}").methods_by_name
        assert set(methods) == {"Infer", "InferStream", "GetMetadata", "Reset"}
        method = methods["GetMetadata"]
        call = channel.unary_unary(
            f"/openpi_flash.v1.{service}/GetMetadata",
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        answer = call(message_factory.GetMessageClass(method.input_type)().SerializeToString(), timeout=10)
        assert MessageToDict(answer)["modelConfigName"] == "pi05_droid_tiny"


def without(observation: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in observation.items() if name != key}


BAD_INPUT = {
    "missing camera": (lambda o: without(o, IMAGE), IMAGE),
    "unknown camera": (lambda o: o | {"observation/exterior_image_1_lef": o[IMAGE]}, "exterior_image_1_lef"),
    "wrong picture shape": (lambda o: o | {IMAGE: np.zeros((224, 224), np.uint8)}, IMAGE),
    "wrong picture dtype": (lambda o: o | {IMAGE: np.zeros((224, 224, 3), np.int32)}, IMAGE),
    "wrong state shape": (lambda o: o | {STATE: np.zeros(6)}, STATE),
    "NaN in the state": (lambda o: o | {STATE: np.full(7, np.nan)}, STATE),
    "prompt of the wrong type": (lambda o: o | {"prompt": 3}, "prompt"),
    "no prompt": (lambda o: without(o, "prompt"), "prompt"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_and_the_service_goes_on(engine: Engine, observation: dict[str, Any], case: str):
    spoil, field = BAD_INPUT[case]
    bad = spoil(copy.copy(observation))
    with GrpcPolicy("127.0.0.1", engine.grpc_port) as client:
        with pytest.raises(InvalidArgumentError) as caught:
            client.infer(bad)
        assert field in str(caught.value)
        assert "Traceback" not in str(caught.value)
        assert client.infer(observation)["actions"].shape == (15, 8)
    with engine.over_websocket() as connection:
        answer = ask(connection, bad)
        assert isinstance(answer, str)
        assert answer.startswith("INVALID_ARGUMENT")
        assert field in answer
        assert "Traceback" not in answer
        with pytest.raises(ConnectionClosed):
            connection.recv(10)
        assert connection.close_code == 1011
    with engine.over_websocket() as connection:
        assert ask(connection, observation)["actions"].shape == (15, 8)


OPTIONS = {
    "unknown mode": ({"mode": "fast"}, "mode"),
    "planner where there is none": ({"mode": "subtask_only"}, "planner"),
    "seed and noise": ({"seed": 1, "noise": np.zeros((15, 32), np.float32)}, "noise"),
    "noise of the wrong shape": ({"noise": np.zeros((15, 8), np.float32)}, "noise"),
    "too many steps": ({"num_steps": 101}, "num_steps"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options_are_named(engine: Engine, observation: dict[str, Any], case: str):
    options, expected = OPTIONS[case]
    with GrpcPolicy("127.0.0.1", engine.grpc_port) as client, pytest.raises(PolicyError, match=expected):
        client.infer(observation, **options)
    with engine.over_websocket() as connection:
        answer = ask(connection, observation | options)
        assert isinstance(answer, str)
        assert expected in answer


@pytest.mark.parametrize("frame", [b"\x81\xa5state", b"", b"\xc1", b"\x93\x01\x02\x03"])
def test_bytes_that_are_no_observation(engine: Engine, observation: dict[str, Any], frame: bytes):
    with engine.over_websocket() as connection:
        connection.send(frame)
        answer = connection.recv(10)
        assert isinstance(answer, str)
        assert answer.startswith("INVALID_ARGUMENT")
        with pytest.raises(ConnectionClosed):
            connection.recv(10)
    with grpc.insecure_channel(f"127.0.0.1:{engine.grpc_port}") as channel:
        call = channel.unary_unary("/openpi_flash.v1.PolicyService/Infer")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\x0a\xff\xff\xff\xff\x0f" + frame, timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with GrpcPolicy("127.0.0.1", engine.grpc_port) as client:
        assert client.infer(observation)["actions"].shape == (15, 8)


def test_an_oversized_message_is_refused(engine: Engine, observation: dict[str, Any]):
    huge = observation | {IMAGE: np.zeros((6000, 6000, 3), np.uint8)}
    with engine.over_websocket() as connection:
        with pytest.raises(ConnectionClosed):
            connection.send(openpi_msgpack.packb(huge))
            connection.recv(30)
        assert connection.close_code == 1009
    with GrpcPolicy("127.0.0.1", engine.grpc_port) as client:
        with pytest.raises(PolicyError) as caught:
            client.infer(huge, timeout_s=30)
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert client.infer(observation)["actions"].shape == (15, 8)


@pytest.mark.parametrize("transport", ["ws", "grpc"])
def test_the_test_command_times_a_server(engine: Engine, transport: str):
    port = engine.websocket_port() if transport == "ws" else engine.grpc_port
    command = [sys.executable, "-m", "openpi_flash_cli", "test", transport, "127.0.0.1", "--port", str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "5 calls after 1 warm-up" in done.stdout
    for part in ("client round trip", "server", "policy (model)", "round trip - server", "server - policy"):
        assert part in done.stdout


def test_recovers_when_the_action_service_is_killed(
    tiny_policies: dict[str, TinyPolicy], tmp_path: Path, observation: dict[str, Any]
):
    with (
        running_engine(tiny_policies["jax"], tmp_path, max_batch_size=1) as engine,
        GrpcPolicy("127.0.0.1", engine.grpc_port, timeout_s=60) as client,
        engine.over_websocket() as connection,
    ):
        before = client.infer(observation, seed=SEED)["actions"]
        os.kill(engine.child_pid("openpi_flash_action"), signal.SIGKILL)
        engine.wait_for("ended with signal SIGKILL; starting again")
        passing = ask(connection, observation | {"seed": SEED})
        assert isinstance(passing, str), "an answer without an action service"
        assert passing.startswith("UNAVAILABLE")
        engine.wait_for(READY, count=2)
        np.testing.assert_array_equal(client.infer(observation, seed=SEED)["actions"], before)
        after = ask(connection, observation | {"seed": SEED})  # the same connection as before
        np.testing.assert_array_equal(after["actions"], before)


def test_a_checkpoint_with_a_tensor_missing_ends_serve_with_its_name(
    tiny_policies: dict[str, TinyPolicy], tmp_path: Path
):
    from safetensors.numpy import load_file, save_file

    tiny = tiny_policies["torch"]
    tensors = load_file(tiny.checkpoint_dir / "model.safetensors")
    del tensors["action_in_proj.bias"]
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(tensors, broken / "model.safetensors")
    (broken / "assets").symlink_to(tiny.checkpoint_dir / "assets")
    engine = start_engine(TinyPolicy(tiny.policy_file, broken), tmp_path)
    assert engine.process.wait(120) != 0
    log = "\n".join(engine.log)
    assert "action_in_proj.bias" in log
    assert "Traceback" not in log
    assert "starting again" not in log


def test_a_config_name_with_a_typo_ends_serve_with_the_nearest(tiny_policies: dict[str, TinyPolicy], tmp_path: Path):
    engine = start_engine(tiny_policies["jax"], tmp_path, model_config_name="pi05_drod")
    assert engine.process.wait(120) != 0
    assert "did you mean 'pi05_droid'" in "\n".join(engine.log)


def test_an_unknown_setting_ends_serve_before_anything_starts(tmp_path: Path):
    path = tmp_path / "settings.json"
    path.write_text('{"action": {"model_config_name": "pi05_droid", "checkpoint_dri": "/nowhere"}}')
    command = [sys.executable, "-m", "openpi_flash_cli", "serve", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "did you mean checkpoint_dir?" in done.stderr
    assert "Traceback" not in done.stderr
