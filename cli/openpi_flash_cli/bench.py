"""`openpi-flash bench model`: how fast this machine runs the model, beside what its memory and arithmetic would allow.

Each arm (a backend in one precision and compile mode, or the planner) is measured in a process of its own, by
bench_arm.py, so that its peak memory is its own. The model's weights are random and made in memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from openpi_flash_models.config import GemmaConfig, ModelConfig, VisionConfig
from openpi_flash_models.cost import action_costs, planner_costs
from openpi_flash_models.errors import PolicyConfigError
from rich.console import Console
from rich.table import Table

SIZES = {
    "full": ModelConfig(),
    "small": ModelConfig(
        vision=VisionConfig(width=128, depth=2, mlp_dim=512, num_heads=2),
        vlm=GemmaConfig(width=256, depth=4, mlp_dim=1024, num_heads=4, num_kv_heads=1, head_dim=64),
        expert=GemmaConfig(width=128, depth=4, mlp_dim=512, num_heads=4, num_kv_heads=1, head_dim=64),
        vocab_size=32_000,
    ),
    "tiny": ModelConfig(
        vision=VisionConfig(width=16, depth=1, mlp_dim=32, num_heads=2, image_size=28),
        vlm=GemmaConfig(width=32, depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16),
        expert=GemmaConfig(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=16),
        vocab_size=512,
    ),
}
NUM_VIEWS = 3
PROMPT_BUCKET, PROMPT_TOKENS = 64, 45  # twenty words and a state
NUM_STEPS = 10
BATCHES = (1, 2, 4, 8, 16)
MAX_TOKENS = 20
MIN_COSINE = 0.999
ARM_TIMEOUT_S = 3600.0

ARMS: dict[str, dict[str, Any]] = {
    "torch-float32": {"backend": "torch", "precision": "float32"},
    "torch": {"backend": "torch"},
    "torch-compile": {"backend": "torch", "compile_mode": "default"},
    "torch-max-autotune": {"backend": "torch", "compile_mode": "max-autotune"},
    "torch-fp8": {"backend": "torch", "prefix_precision": "fp8"},
    "torch-guided": {"backend": "torch", "continues": "guided"},
    "jax-float32": {"backend": "jax", "precision": "float32"},
    "jax": {"backend": "jax"},
    "jax-guided": {"backend": "jax", "continues": "guided"},
    "planner": {"backend": "planner"},
}
"""By name: the backend, and what `load` is told beside the device. With those in float32 others are compared.

`continues`: chunks that continue others (real-time chunking), whose limit is that of chunks that do not.
"""

DEFAULT_ARMS = ("torch", "torch-fp8", "torch-guided", "jax", "planner", "torch-compile")
"""The slowest to start comes last, for a run that is cut off."""

FRAMEWORKS = {"torch": "torch", "jax": "jax", "planner": "jax"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("model",))
    parser.add_argument("--size", choices=tuple(SIZES), help="default: full on a GPU, small without one")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where PyTorch or JAX finds one")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=tuple(ARMS),
        help=f"what to measure; the float32 model of each backend is added (default: those of {', '.join(DEFAULT_ARMS)}"
        " that are installed; fp8 on a GPU alone)",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="default: 1 2 4 8 16")
    parser.add_argument("--runs", type=int, help="timed calls of each batch (default: 200 on a GPU, 10 without one)")
    parser.add_argument(
        "--together",
        type=int,
        default=1,
        metavar="N",
        help="arms that load and compile side by side, where memory holds as many (default: 1); none is timed beside"
        " another",
    )
    parser.add_argument("--profile", action="store_true", help="of PyTorch: kernels, the longest, gaps between them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table as a picture, e.g. model.png")


def run(arguments: argparse.Namespace) -> int:
    device = arguments.device or find_device()
    size = arguments.size or ("full" if device == "cuda" else "small")
    console = Console(width=max(Console().width, 132))  # the table's
    names = with_references(arguments.arms or default_arms(device))
    job = {
        "device": device,
        "size": size,
        "batches": sorted(set(arguments.batches)),
        "runs": arguments.runs or (200 if device == "cuda" else 10),
        "profile": arguments.profile,
    }
    report: dict[str, Any] = {"job": job, "commit": commit(), "arms": {}}
    with tempfile.TemporaryDirectory(prefix="openpi-flash-bench-") as directory:
        for name, result in measure(names, job, Path(directory), together=arguments.together):
            console.print(f"{name}: {'failed' if 'error' in result else 'measured'}")
            report["arms"][name] = result if "error" in result else evaluate(name, result, size, Path(directory))
            # After each arm, so that a run that is cut off leaves what it has.
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report, console)
    if arguments.plot:
        from openpi_flash_cli.bench_plot import draw

        draw(report, arguments.plot)
        console.print(f"drew {arguments.plot}")
    failed = [name for name, arm in report["arms"].items() if "error" in arm or not arm.get("accurate", True)]
    if failed:
        console.print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def find_device() -> str:
    """`cuda` where PyTorch, or else JAX, finds a GPU; asked in a process of its own, which lets go of it again."""
    for framework, code in (
        ("torch", "import torch; print(torch.cuda.is_available())"),
        ("jax", "import jax; print(jax.default_backend() == 'gpu')"),
    ):
        if find_spec(framework):
            found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
            if found.stdout.strip() == "True":
                return "cuda"
    return "cpu"


def default_arms(device: str) -> list[str]:
    arms = [name for name in DEFAULT_ARMS if find_spec(FRAMEWORKS[ARMS[name]["backend"]])]
    if not arms:
        raise PolicyConfigError("neither PyTorch nor JAX is installed: pip install 'openpi-flash[torch,jax]'")
    return [name for name in arms if device == "cuda" or name != "torch-fp8"]


def with_references(names: list[str]) -> list[str]:
    """The arms, each backend's float32 model before them."""
    backends = dict.fromkeys(ARMS[name]["backend"] for name in names if "continues" not in ARMS[name])
    references = [f"{backend}-float32" for backend in backends if backend != "planner"]
    return [*references, *(name for name in names if name not in references)]


class Running(NamedTuple):
    """An arm's process. It writes files, so that no pipe fills up while others have their turn."""

    process: subprocess.Popen[bytes]
    ready: Path
    output: Path
    errors: Path


def measure(
    names: list[str], job: dict[str, Any], directory: Path, *, together: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What bench_arm.py says of each arm; `error` where it failed.

    `together` arms at a time load and compile side by side; each is timed while all others wait.
    """
    for first in range(0, len(names), together):
        running = {name: start(name, job, directory) for name in names[first : first + together]}
        try:
            for arm in running.values():
                wait_until_ready(arm)
            for name, arm in running.items():
                yield name, finish(arm)
        finally:
            for arm in running.values():
                arm.process.kill()
                arm.process.wait()


def start(name: str, job: dict[str, Any], directory: Path) -> Running:
    files = [directory / f"{name}.{suffix}" for suffix in ("ready", "json", "err")]
    request = {**job, "arm": ARMS[name], "actions": str(directory / f"{name}.npy"), "ready": str(files[0])}
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "openpi_flash_cli.bench_arm", json.dumps(request)]
    with files[1].open("wb") as output, files[2].open("wb") as errors:
        process = subprocess.Popen(  # noqa: S603 - ourselves
            command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=errors
        )
    return Running(process, *files)


def wait_until_ready(arm: Running) -> None:
    """Until it waits for its turn, or has ended."""
    end = time.monotonic() + ARM_TIMEOUT_S
    while not arm.ready.exists() and arm.process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def finish(arm: Running) -> dict[str, Any]:
    """Gives an arm its turn."""
    if not arm.ready.exists() and arm.process.poll() is None:
        return {"error": f"was not ready after {ARM_TIMEOUT_S:.0f} s"}
    try:
        arm.process.communicate(b"\n", timeout=ARM_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {ARM_TIMEOUT_S:.0f} s"}
    if arm.process.returncode:
        return {"error": arm.errors.read_text().strip()[-2000:] or f"exit code {arm.process.returncode}"}
    result: dict[str, Any] = json.loads(arm.output.read_text().splitlines()[-1])
    return result


def evaluate(name: str, result: dict[str, Any], size: str, directory: Path) -> dict[str, Any]:
    """Adds to an arm's times the least that they could be, the share of that reached, and how exact the actions are."""
    config, arm = SIZES[size], ARMS[name]
    weight_bytes = 4 if arm.get("precision") == "float32" else 2
    rates = {"flops_per_s": result["matmul_flops_per_s"], "bytes_per_s": result["copy_bytes_per_s"]}
    if arm["backend"] == "planner":
        costs = planner_costs(config, num_views=NUM_VIEWS, prompt=PROMPT_BUCKET, weight_bytes=weight_bytes)
        for part in ("first", "further"):
            result[f"{part}_token"]["limit_ms"] = costs[part].seconds(**rates) * 1e3
        return result
    for batch, times in result["batches"].items():
        shape = {"batch": int(batch), "num_views": NUM_VIEWS, "prompt": PROMPT_BUCKET, "num_steps": NUM_STEPS}
        costs = action_costs(config, **shape, weight_bytes=weight_bytes)
        times["flops"] = sum(cost.flops for cost in costs.values())
        times["bytes"] = sum(cost.num_bytes for cost in costs.values())
        times["limit_ms"] = sum(cost.seconds(**rates) for cost in costs.values()) * 1e3
        times["share_of_limit"] = times["limit_ms"] / times["p50_ms"]
        times["requests_per_s"] = int(batch) / times["p50_ms"] * 1e3
    reference = directory / f"{arm['backend']}-float32.npy"
    if reference.exists() and "continues" not in arm:
        exact, actual = np.load(reference).astype(np.float64), np.load(directory / f"{name}.npy").astype(np.float64)
        cosine = np.vdot(exact, actual) / (np.linalg.norm(exact) * np.linalg.norm(actual))
        result["cosine"], result["max_difference"] = float(cosine), float(np.abs(exact - actual).max())
        result["accurate"] = bool(cosine >= MIN_COSINE)
    return result


def print_report(report: dict[str, Any], console: Console) -> None:
    """One row for each batch of each arm."""
    job, arms = report["job"], report["arms"]
    measured = [arm for arm in arms.values() if "error" not in arm]
    where = measured[0]["device_name"] if measured else job["device"]
    title = f"{job['size']} pi0.5, {NUM_VIEWS} views, {NUM_STEPS} steps, on {where}, {job['runs']} runs"
    table = Table(title=title, title_justify="left")
    figures = ("p50 ms", "p95", "p99", "requests/s", "limit ms", "reached", "peak GB", "cosine", "max diff")
    for heading in ("", "batch", *figures):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, arm in arms.items():
        if "error" in arm:
            console.print(f"{name}: {arm['error']}", markup=False)
            continue
        accuracy = [f"{arm['cosine']:.6f}", f"{arm['max_difference']:.1e}"] if "cosine" in arm else ["", ""]
        peak = f"{arm['peak_bytes'] / 1e9:.2f}"
        for batch, times in arm.get("batches", {}).items():
            shown = [f"{times[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms", "requests_per_s", "limit_ms")]
            table.add_row(name, batch, *shown, f"{times['share_of_limit']:.0%}", peak, *accuracy)
            name, peak, accuracy = "", "", ["", ""]  # noqa: PLW2901 - said once
        for part in ("first_token", "further_token", f"all_{MAX_TOKENS}_tokens"):
            if part in arm:
                times = arm[part]
                shown = [f"{times[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms")]
                limit = f"{times['limit_ms']:.2f}" if "limit_ms" in times else ""
                reached = f"{times['limit_ms'] / times['p50_ms']:.0%}" if limit else ""
                table.add_row(f"{name} {part}".replace("_", " "), "1", *shown, "", limit, reached, peak, "", "")
                peak = ""
    console.print(table)
    for name, arm in arms.items():
        if "error" in arm:
            continue
        console.print(
            f"{name}: {arm['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s, copying {arm['copy_bytes_per_s'] / 1e9:.3g} GB/s,"
            f" loaded in {arm['load_s']:.1f} s, first calls {arm['first_calls_s']:.1f} s"
            + (f", {arm['ops']} operations" if "ops" in arm else "")
        )
        for warning in arm.get("warnings", ()):
            console.print(f"{name}: {warning}", markup=False)
        if "profile" in arm:
            print_profile(name, arm["profile"], console)


def print_profile(name: str, profile: dict[str, Any], console: Console) -> None:
    console.print(
        f"{name}, one call of a batch of 1: {profile['count']} {profile['what']}, {profile['busy_ms']:.2f} ms"
        + (f", gaps between them {profile['gaps_ms']:.2f} ms" if "gaps_ms" in profile else "")
    )
    for each in profile["longest"][:10]:
        console.print(f"  {each['total_ms']:8.3f} ms  {each['count']:5} x  {each['name'][:90]}", markup=False)


def commit() -> str | None:
    """Of the source tree, where this runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="openpi-flash bench", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
