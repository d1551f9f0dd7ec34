"""The action service in a process of its own, with a small random checkpoint: start, readiness, stop, and what it says
about settings and files that cannot be used."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openpi_flash.v1 import action_pb2_grpc, inference_pb2, types_pb2
from openpi_flash_common.codec import tensor_from_proto, tensor_to_proto
from openpi_flash_common.model_server import select_shapes
from openpi_flash_common.process_test import Process
from openpi_flash_common.settings import SettingsError, WarmUpSettings
from openpi_flash_models.batching import WarmUpShape
from openpi_flash_models.checkpoints.synthetic import make_checkpoint
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy import Policy
from openpi_flash_models.policy_configs import load_policy_config

TOKENIZER = Path(__file__).parents[3] / "tests/data/golden/tokenizer/tiny_visible.model"
MODEL = {
    "vision": {"width": 16, "depth": 1, "mlp_dim": 16, "num_heads": 2},
    "vlm": {"width": 16, "depth": 1, "mlp_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    "expert": {"width": 16, "depth": 1, "mlp_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    "vocab_size": 512,
}
PICTURES = {
    f"observation/{name}": np.random.default_rng(1).integers(0, 256, (224, 224, 3), np.uint8)
    for name in ("exterior_image_1_left", "wrist_image_left")
}
NUMBERS = {"observation/joint_position": np.linspace(-1, 1, 7), "observation/gripper_position": np.array([0.5])}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with `policy.json` and `checkpoint`."""
    directory = tmp_path_factory.mktemp("action")
    fields = {"extends": "pi05_droid", "name": "tiny", "model": MODEL, "tokenizer": str(TOKENIZER)}
    (directory / "policy.json").write_text(json.dumps(fields))
    config = load_policy_config(directory / "policy.json")
    make_checkpoint(directory / "checkpoint", config.model, layout="torch", asset_ids={"droid": (8, 8)})
    return directory


@pytest.fixture
def start(tmp_path, files):
    processes = []

    def start(**action: Any) -> Process:
        settings = {
            "model_config_name": str(files / "policy.json"),
            "checkpoint_dir": str(files / "checkpoint"),
            "precision": "float32",
            "device": "cpu",
            "num_steps": 3,
            "max_batch_size": 2,
            "grpc_port": 0,
            **action,
        }
        processes.append(Process("openpi_flash_action", tmp_path, {"action": settings}))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def make_request() -> inference_pb2.InferRequest:
    request = inference_pb2.InferRequest(seed=11)
    for path, pixels in PICTURES.items():
        request.observation.images[path].CopyFrom(
            types_pb2.Image(encoding=types_pb2.IMAGE_ENCODING_RAW, height=224, width=224, data=pixels.tobytes())
        )
    for path, numbers in NUMBERS.items():
        request.observation.tensors[path].CopyFrom(tensor_to_proto(numbers))
    request.observation.prompt = "open the drawer"
    return request


def load_directly(files: Path) -> Policy:
    config = load_policy_config(files / "policy.json")
    return load_policy(config, files / "checkpoint", precision="float32", device="cpu", num_steps=3, max_batch_size=2)


async def test_it_listens_at_once_serves_when_warm_and_stops_cleanly(start, files):
    process = start()
    async with grpc.aio.insecure_channel(await process.address()) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        first = (await watch.read()).status
        assert first == health_pb2.HealthCheckResponse.NOT_SERVING
        stub = action_pb2_grpc.ActionServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="loaded and warmed up"):
            await stub.Infer(make_request(), timeout=20)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

        response = await stub.Infer(make_request(), timeout=20)
        actions = tensor_from_proto(response.tensors["actions"], "actions")
        expected = load_directly(files).infer({**PICTURES, **NUMBERS, "prompt": "open the drawer"}, seed=11)["actions"]
        assert actions.tobytes() == expected.tobytes()
        metadata = await stub.GetMetadata(inference_pb2.GetMetadataRequest(), timeout=20)
        assert (metadata.model_config_name, metadata.backend, metadata.default_num_steps) == ("tiny", "torch", 3)
        process.terminate()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await process.end() == 0
    assert any("warm " in line for line in process.log)


async def test_a_stop_while_it_loads_is_clean(start):
    process = start()
    await process.address()
    process.terminate()
    assert await process.end() == 0


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"model_config_name": "pi05_driod"}, "pi05_droid"),
        ({"checkpoint_dir": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"backend": "jax"}, "params"),
        ({"warm_up": {"batch_sizes": [3]}}, r"action\.warm_up\.batch_sizes: 3 cannot occur; 1, 2 can"),
        ({"num_steps": 0}, r"action\.num_steps"),
        ({"grpc_prot": 1}, "did you mean grpc_port"),
    ],
)
async def test_what_cannot_be_served_is_said_in_a_line_and_not_tried_again(start, action, message):
    said = await start(**action).refusal()
    assert re.search(message, said), said


async def test_a_checkpoint_without_a_tensor_names_it(start, files, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(files / "checkpoint", tmp_path / "checkpoint")
    weights = tmp_path / "checkpoint/model.safetensors"
    weights.chmod(0o644)
    tensors = load_file(weights)
    missing = next(name for name in tensors if name.endswith("action_in_proj.weight"))
    del tensors[missing]
    weights.unlink()
    save_file(tensors, weights)
    assert missing in await start(checkpoint_dir=str(tmp_path / "checkpoint")).refusal()


def test_warm_up_shapes_follow_the_settings(files):
    policy = load_directly(files)
    shapes = policy.warm_up_shapes()
    assert select_shapes(shapes, WarmUpSettings(), "action") == shapes
    bucket = policy.prompt_buckets[0]
    assert select_shapes(shapes, WarmUpSettings(batch_sizes=(1,), prompt_buckets=(bucket,)), "action") == [
        WarmUpShape(1, num_views, bucket) for num_views in reversed(policy.view_counts)
    ]
    with pytest.raises(SettingsError, match="prompt_buckets: 7 cannot occur"):
        select_shapes(shapes, WarmUpSettings(prompt_buckets=(7,)), "action")
