"""Writes a random pi0.5 in bfloat16 at full size, converts it, and serves it on the CPU with each backend.

Each stage is a process of its own, so that its peak memory is its own; that of a backend is the action service's, less
what the same service needs for a tiny policy. Prints time and peak memory of each stage, and fails when a backend needs
more than MAX_RATIO times the weights, or when the two disagree. Linux only.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openpi_flash.v1 import action_pb2_grpc, inference_pb2
from openpi_flash_cli.demo import free_ports
from openpi_flash_cli.scene import camera_picture
from openpi_flash_cli.tiny import ASSETS, make_tiny_policy
from openpi_flash_common.codec import tensor_from_proto, tensor_to_proto
from openpi_flash_models.checkpoints.convert import convert
from openpi_flash_models.checkpoints.detect import detect
from openpi_flash_models.checkpoints.synthetic import make_checkpoint
from openpi_flash_models.config import GemmaConfig, ModelConfig, VisionConfig

SERVING = health_pb2.HealthCheckResponse.SERVING

SIZES = {
    "full": ModelConfig(),
    # About 1.3 GB of weights: enough that they dwarf what a framework keeps for itself.
    "small": ModelConfig(
        vision=VisionConfig(width=288, depth=4, mlp_dim=1024, num_heads=4),
        vlm=GemmaConfig(width=2048, depth=6, mlp_dim=8192, num_heads=4, num_kv_heads=1, head_dim=128),
        expert=GemmaConfig(width=512, depth=6, mlp_dim=2048, num_heads=4, num_kv_heads=1, head_dim=128),
        vocab_size=150_000,
    ),
}
MAX_RATIO = 1.15
MIN_COSINE = 0.999
STAGES = ("write", "convert", "jax", "torch")
READY_TIMEOUT_S = 3600.0
POLICY_NAME = "pi05_droid_random"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One stage.

    Attributes:
        work_s: writing, converting, or from the start of the service until it is warm.
        peak_bytes: most resident memory beyond what the process needs without the weights.
        answer_s: one answer of the warm service.
    """

    work_s: float
    peak_bytes: int
    answer_s: float | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dir", type=Path, help="where to write, and to find what an earlier run wrote")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--in-this-process", choices=STAGES[:2], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_this_process:
        measured = run_stage(arguments.in_this_process, SIZES[arguments.size], arguments.dir)
        print(json.dumps(dataclasses.asdict(measured)))
        return 0
    with tempfile.TemporaryDirectory(prefix="openpi-flash-smoke-") as temporary:
        directory = arguments.dir or Path(temporary)
        return run_stages(arguments.stages, arguments.size, directory)


def run_stages(stages: list[str], size: str, directory: Path) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Measured] = {}
    print(f"{'stage':8} {'s':>8} {'peak GB':>8} {'/ weights':>9} {'answer s':>9}")
    for stage in stages:
        done = {"write": directory / "jax", "convert": directory / "torch"}.get(stage)
        if done is not None and done.exists():
            print(f"{stage:8} found in {done}")
            continue
        if stage in ("jax", "torch"):
            result = serve_and_answer(stage, SIZES[size], directory)
        else:
            command = [sys.executable, __file__, "--size", size, "--dir", str(directory), "--in-this-process", stage]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = Measured(**json.loads(run.stdout.splitlines()[-1]))
        measured[stage] = result
        ratio = result.peak_bytes / weight_bytes(directory)
        answer = "" if result.answer_s is None else f"{result.answer_s:9.1f}"
        print(f"{stage:8} {result.work_s:8.1f} {result.peak_bytes / 1e9:8.2f} {ratio:9.3f} {answer}", flush=True)
    weights = weight_bytes(directory)
    print(f"weights: {weights / 1e9:.3f} GB")
    problems = [
        f"{stage}: {result.peak_bytes / weights:.3f} times the weights, at most {MAX_RATIO} expected"
        for stage, result in measured.items()
        if result.answer_s is not None and result.peak_bytes > MAX_RATIO * weights
    ]
    answers = [directory / f"{backend}.npy" for backend in ("jax", "torch")]
    if all(path.exists() for path in answers):
        one, other = (np.load(path).astype(np.float64) for path in answers)
        cosine = np.vdot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other))
        print(f"actions {one.shape}, std {one.std():.3f}; cosine between the backends {cosine:.6f}")
        if not cosine >= MIN_COSINE:
            problems.append(f"cosine {cosine:.6f} between the backends, at least {MIN_COSINE} expected")
    print("\n".join(problems) or "passed")
    return 1 if problems else 0


def run_stage(stage: str, config: ModelConfig, directory: Path) -> Measured:
    baseline = peak_bytes("self")
    started = time.perf_counter()
    if stage == "write":
        make_checkpoint(directory / "jax", config, asset_ids=ASSETS)
    else:
        convert(directory / "jax", directory / "torch", config)
    return Measured(time.perf_counter() - started, peak_bytes("self") - baseline)


def serve_and_answer(backend: str, config: ModelConfig, directory: Path) -> Measured:
    tiny_dir = directory / "tiny"
    if not tiny_dir.exists():
        for layout in ("jax", "torch"):
            make_tiny_policy(tiny_dir, layout=layout)
    policy_file = directory / "policy.json"
    fields = {"extends": "pi05_droid", "name": POLICY_NAME, "model": model_fields(config)}
    policy_file.write_text(json.dumps({**fields, "tokenizer": str(tiny_dir / "tokenizer.model")}))
    without, _ = measure_service(tiny_dir / "pi05_droid_tiny.json", tiny_dir / f"pi05_droid_tiny_{backend}")
    measured, actions = measure_service(policy_file, directory / backend)
    np.save(directory / f"{backend}.npy", actions)
    return dataclasses.replace(measured, peak_bytes=measured.peak_bytes - without.peak_bytes)


def measure_service(policy_file: Path, checkpoint_dir: Path) -> tuple[Measured, np.ndarray]:
    """Starts the action service, waits until it is warm and asks it once."""
    (port,) = free_ports(1)
    action = {
        "model_config_name": str(policy_file),
        "checkpoint_dir": str(checkpoint_dir),
        "device": "cpu",
        "max_batch_size": 1,
        "warm_up": {"prompt_buckets": [64]},
        "grpc_port": port,
    }
    started = time.perf_counter()
    command = [sys.executable, "-m", "openpi_flash_action"]
    with subprocess.Popen(command, env={**os.environ, "OPENPI_ACTION": json.dumps(action)}) as process:
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                wait_serving(channel, process)
                ready_s = time.perf_counter() - started
                asked = time.perf_counter()
                answer = action_pb2_grpc.ActionServiceStub(channel).Infer(droid_request(), timeout=READY_TIMEOUT_S)
                answer_s = time.perf_counter() - asked
            return Measured(ready_s, peak_bytes(process.pid), answer_s), tensor_from_proto(
                answer.tensors["actions"], "actions"
            )
        finally:
            process.terminate()


def wait_serving(channel: grpc.Channel, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    health = health_pb2_grpc.HealthStub(channel)
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if health.Check(health_pb2.HealthCheckRequest(), timeout=30).status == SERVING:
                return
        except grpc.RpcError:
            pass  # not listening yet
        time.sleep(0.2)
    raise RuntimeError("the action service did not become ready")


def droid_request() -> inference_pb2.InferRequest:
    arrays = {
        "observation/exterior_image_1_left": camera_picture(0, 0, height=224, width=224),
        "observation/wrist_image_left": camera_picture(1, 0, height=224, width=224),
        "observation/joint_position": np.linspace(-0.5, 0.5, 7),
        "observation/gripper_position": np.array([0.25]),
    }
    request = inference_pb2.InferRequest(seed=0)
    request.observation.prompt = "put the red block into the bowl"
    for name, array in arrays.items():
        request.observation.tensors[name].CopyFrom(tensor_to_proto(array))
    return request


def model_fields(config: ModelConfig) -> dict[str, object]:
    fields = dataclasses.asdict(config)
    return {name: fields[name] for name in ("vision", "vlm", "expert", "vocab_size", "action_horizon")}


def peak_bytes(pid: int | str) -> int:
    """Most memory that a process ever had resident (getrusage would count its parent's before exec, too)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def weight_bytes(directory: Path) -> int:
    source = detect(directory / "jax").open()
    return sum(int(np.prod(source.shape(name))) * source.dtype(name).itemsize for name in source.names())


if __name__ == "__main__":
    raise SystemExit(main())
