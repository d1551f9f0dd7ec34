"""Writes a random pi0.5 in bfloat16 at full size, converts it, and runs it on the CPU with each backend.

Each stage is a process of its own, so that its peak memory is its own. Prints time and peak memory of each stage, and
fails when a backend needs more than MAX_RATIO times the weights, or when the two disagree. Linux only.
"""

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from openpi_flash_models.checkpoints.check import random_batch
from openpi_flash_models.checkpoints.convert import convert
from openpi_flash_models.checkpoints.detect import detect
from openpi_flash_models.checkpoints.synthetic import make_checkpoint
from openpi_flash_models.config import GemmaConfig, ModelConfig, VisionConfig

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


@dataclasses.dataclass(frozen=True)
class Measured:
    """One stage. Memory is resident bytes beyond those of the interpreter with its imports done.

    Attributes:
        work_s: writing, converting, or loading.
        work_bytes: peak of that.
        peak_bytes: peak of all, an answer included.
        first_s: first answer, compilation included.
        answer_s: second answer.
    """

    work_s: float
    work_bytes: int
    peak_bytes: int
    first_s: float | None = None
    answer_s: float | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dir", type=Path, help="where to write, and to find what an earlier run wrote")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--in-this-process", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_this_process:
        measured = run_stage(arguments.in_this_process, SIZES[arguments.size], arguments.dir)
        print(json.dumps(dataclasses.asdict(measured)))
        return 0
    with tempfile.TemporaryDirectory(prefix="openpi-flash-smoke-") as temporary:
        directory = arguments.dir or Path(temporary)
        return run_stages(arguments.stages, arguments.size, directory)


def run_stages(stages: list[str], size: str, directory: Path) -> int:
    measured: dict[str, Measured] = {}
    print(
        f"{'stage':8} {'work s':>8} {'peak GB':>8} {'ratio':>6} {'1st answer s':>15} {'2nd':>9} {'ratio with both':>19}"
    )
    for stage in stages:
        done = {"write": directory / "jax", "convert": directory / "torch"}.get(stage)
        if done is not None and done.exists():
            print(f"{stage:8} found in {done}")
            continue
        command = [sys.executable, __file__, "--size", size, "--dir", str(directory), "--in-this-process", stage]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = measured[stage] = Measured(**json.loads(run.stdout.splitlines()[-1]))
        weights = weight_bytes(directory)
        line = f"{stage:8} {result.work_s:8.1f} {result.work_bytes / 1e9:8.2f} {result.work_bytes / weights:6.3f}"
        if result.first_s is not None:
            line += f" {result.first_s:15.1f} {result.answer_s:9.1f} {result.peak_bytes / weights:19.3f}"
        print(line, flush=True)
    weights = weight_bytes(directory)
    print(f"weights: {weights / 1e9:.3f} GB")
    problems = [
        f"{stage}: {result.peak_bytes / weights:.3f} times the weights, at most {MAX_RATIO} expected"
        for stage, result in measured.items()
        if result.first_s is not None and result.peak_bytes > MAX_RATIO * weights
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
    if stage in ("jax", "torch"):
        return load_and_answer(stage, config, directory)
    baseline = resident_peak_bytes()
    started = time.perf_counter()
    if stage == "write":
        make_checkpoint(directory / "jax", config, asset_ids={"droid": (8, 8)})
    else:
        convert(directory / "jax", directory / "torch", config)
    work_s = time.perf_counter() - started
    peak = resident_peak_bytes() - baseline
    return Measured(work_s, peak, peak)


def load_and_answer(backend: str, config: ModelConfig, directory: Path) -> Measured:
    module = importlib.import_module(f"openpi_flash_models.{backend}.backend")
    batch = random_batch(config, seed=0)
    baseline = resident_peak_bytes()
    started = time.perf_counter()
    source = detect(directory / backend).open()
    loaded = module.load(config, source, device="cpu")
    source.close()
    work_s, work_bytes = time.perf_counter() - started, resident_peak_bytes() - baseline
    times_s = []
    for _ in range(2):
        started = time.perf_counter()
        actions = loaded.sample_actions(batch)
        times_s.append(time.perf_counter() - started)
    np.save(directory / f"{backend}.npy", actions)
    return Measured(work_s, work_bytes, resident_peak_bytes() - baseline, *times_s)


def resident_peak_bytes() -> int:
    """Most memory that this process ever had resident (getrusage would count its parent's before exec, too)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def weight_bytes(directory: Path) -> int:
    source = detect(directory / "jax").open()
    return sum(int(np.prod(source.shape(name))) * source.dtype(name).itemsize for name in source.names())


if __name__ == "__main__":
    raise SystemExit(main())
