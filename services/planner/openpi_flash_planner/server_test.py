"""The planner service in a process of its own, with a small random checkpoint: start, readiness, reflection, stop, and
what it says about settings and files that cannot be used."""

import json
import re
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from openpi_flash.v1 import planner_pb2, planner_pb2_grpc, types_pb2
from openpi_flash_common.process_test import Process
from openpi_flash_models.checkpoints.synthetic import make_checkpoint
from openpi_flash_models.planner.config import load_planner_config
from openpi_flash_models.planner.load import load_planner
from openpi_flash_models.planner.planner import GenerationOptions

TOKENIZER = Path(__file__).parents[3] / "tests/data/golden/tokenizer/tiny_visible.model"
SIZES = {"width": 16, "depth": 1, "mlp_dim": 16, "num_heads": 2}
TEXT_SIZES = {**SIZES, "num_kv_heads": 1, "head_dim": 8}
MODEL = {"vision": SIZES, "vlm": TEXT_SIZES, "expert": TEXT_SIZES, "vocab_size": 512}
PICTURES = {
    f"observation/{name}": np.random.default_rng(1).integers(0, 256, (224, 224, 3), np.uint8)
    for name in ("exterior_image_1_left", "wrist_image_left")
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with `policy.json` and the checkpoints `jax` and `torch`."""
    directory = tmp_path_factory.mktemp("planner")
    fields = {"extends": "pi05_droid", "name": "tiny", "model": MODEL, "tokenizer": str(TOKENIZER)}
    (directory / "policy.json").write_text(json.dumps(fields))
    config = load_planner_config(directory / "policy.json")
    for layout in ("jax", "torch"):
        make_checkpoint(directory / layout, config.model, layout=layout, seed=2)
    return directory


@pytest.fixture
def start(tmp_path, files):
    processes = []

    def start(**planner: Any) -> Process:
        settings = {
            "model_config_name": str(files / "policy.json"),
            "checkpoint_dir": str(files / "jax"),
            "precision": "float32",
            "device": "cpu",
            "max_batch_size": 2,
            "max_generation_tokens": 6,
            "warm_up": {"batch_sizes": [1]},
            "default_prompt": "open the drawer",
            "grpc_port": 0,
            **planner,
        }
        processes.append(Process("openpi_flash_planner", tmp_path, {"planner": settings}))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def make_request() -> planner_pb2.GenerateSubtaskRequest:
    request = planner_pb2.GenerateSubtaskRequest()
    for path, pixels in PICTURES.items():
        request.observation.images[path].CopyFrom(
            types_pb2.Image(encoding=types_pb2.IMAGE_ENCODING_RAW, height=224, width=224, data=pixels.tobytes())
        )
    return request


async def test_it_listens_at_once_serves_when_warm_and_stops_cleanly(start, files):
    process = start()
    async with grpc.aio.insecure_channel(await process.address()) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="openpi_flash.v1.PlannerService")
        )
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stub = planner_pb2_grpc.PlannerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="loaded and warmed up"):
            await stub.GenerateSubtask(make_request(), timeout=20)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        listed = {service.name for service in (await reflection.read()).list_services_response.service}
        assert "openpi_flash.v1.PlannerService" in listed

        response = await stub.GenerateSubtask(make_request(), timeout=60)
        config = load_planner_config(files / "policy.json")
        planner = load_planner(config, files / "jax", device="cpu", precision="float32")
        expected = planner.infer(
            {**PICTURES, "prompt": "open the drawer"}, options=GenerationOptions(max_generation_tokens=6)
        )
        assert (response.text, response.num_tokens) == (expected.text, expected.num_tokens)
        assert response.action_prompt == f"open the drawer. Subtask: {expected.text}"
        assert response.text
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
    ("planner", "message"),
    [
        ({"model_config_name": "pi0_droid"}, "writes no subtasks"),
        ({"checkpoint_dir": "torch"}, "PyTorch weights only"),
        ({"warm_up": {"batch_sizes": [3]}}, r"planner\.warm_up\.batch_sizes: 3 cannot occur; 1, 2 can"),
        ({"device": "abacus"}, "none that JAX can use"),
        ({"generation_prompt_format": "Subtask: "}, r"planner\.generation_prompt_format: must hold \{task\}"),
    ],
)
async def test_what_cannot_be_served_is_said_in_a_line_and_not_tried_again(start, files, planner, message):
    if "checkpoint_dir" in planner:
        planner = {"checkpoint_dir": str(files / planner["checkpoint_dir"])}
    said = await start(**planner).refusal()
    assert re.search(message, said), said
