"""From the start of the action service until it is ready, with a random pi0.5 of full size; and answers of it then.

The checkpoint is written first, so that the page cache holds it. The service starts several times: the first time
nothing is compiled yet, then everything is. Each time one robot with three cameras asks it over gRPC, on loopback.
Without a GPU a tiny model shows that it runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from openpi_flash.v1 import action_pb2_grpc, inference_pb2
from openpi_flash_cli.bench import SIZES, find_device
from openpi_flash_cli.bench_arm import RandomSource
from openpi_flash_cli.demo import free_ports
from openpi_flash_cli.scene import camera_picture
from openpi_flash_cli.tiny import ROBOTS, make_tiny_policy
from openpi_flash_common.codec import tensor_to_proto
from openpi_flash_models.checkpoints.layout import torch_shapes
from openpi_flash_models.checkpoints.write import write_safetensors
from openpi_flash_models.config import ModelConfig
from smoke_full_size import model_fields, wait_serving

CALLS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--action", type=json.loads, default={}, help="settings of the action service, as JSON")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="where to write, and to find what an earlier run wrote and compiled")
    arguments = parser.parse_args()
    device = find_device()
    with tempfile.TemporaryDirectory(prefix="openpi-flash-start-") as temporary:
        directory = arguments.dir or Path(temporary)
        if not directory.exists() or directory == Path(temporary):
            write_policy(directory, SIZES["full" if device == "cuda" else "tiny"])
        files = {"model_config_name": str(directory / "policy.json"), "checkpoint_dir": str(directory / "checkpoint")}
        # Whatever compiles keeps what it compiled below the home directory, or where it is told.
        caches = {name: str(directory / name) for name in ("TRITON_CACHE_DIR", "OPENPI_DATA_HOME")}
        figures = []
        for _ in range(arguments.starts):
            figures.append(start_and_ask({**files, "device": device, **arguments.action}, caches))
            shown = ", ".join(f"{key} {value:.2f}" for key, value in figures[-1].items())
            print(f"start {len(figures)} on {device}: {shown}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def write_policy(directory: Path, config: ModelConfig) -> None:
    """A policy file and a checkpoint for a robot with three cameras."""
    tiny = make_tiny_policy(directory / "tiny", robot="three_cameras", layout="torch")
    checkpoint_dir = directory / "checkpoint"
    fields = {**ROBOTS["three_cameras"], "name": "pi05_random", "model": model_fields(config)}
    (directory / "policy.json").write_text(json.dumps({**fields, "tokenizer": str(directory / "tiny/tokenizer.model")}))
    checkpoint_dir.mkdir()
    (checkpoint_dir / "assets").symlink_to(tiny.checkpoint_dir / "assets")
    source = RandomSource(torch_shapes(config))
    header = {name: (source.shape(name), source.dtype(name)) for name in source.names()}
    write_safetensors(checkpoint_dir / "model.safetensors", header, ((name, source.read(name)) for name in header))


def start_and_ask(action: dict[str, Any], environment: dict[str, str]) -> dict[str, float]:
    """Seconds until the service is ready, and milliseconds of its answers."""
    (port,) = free_ports(1)
    environment = {**os.environ, **environment, "OPENPI_ACTION": json.dumps({**action, "grpc_port": port})}
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "openpi_flash_action"], env=environment) as process:
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                wait_serving(channel, process)
                ready_s = time.perf_counter() - started
                infer, request, times = action_pb2_grpc.ActionServiceStub(channel).Infer, three_cameras(), []
                for _ in range(CALLS):
                    asked = time.perf_counter()
                    infer(request, timeout=60)
                    times.append((time.perf_counter() - asked) * 1e3)
        finally:
            process.terminate()
    return {
        "ready_s": ready_s,
        "first_ms": times[0],
        "p50_ms": statistics.median(times),
        "p99_ms": float(np.percentile(times, 99)),
    }


def three_cameras() -> inference_pb2.InferRequest:
    request = inference_pb2.InferRequest()
    request.observation.prompt = (
        "put the red block into the blue bowl, then close the drawer and come back to where you were"
    )
    arrays = {name: camera_picture(i, 0, height=224, width=224) for i, name in enumerate(("top", "left", "right"))}
    for name, array in {**arrays, "state": np.linspace(-0.5, 0.5, 8)}.items():
        request.observation.tensors[name].CopyFrom(tensor_to_proto(array))
    return request


if __name__ == "__main__":
    main()
