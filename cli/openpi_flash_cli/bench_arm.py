"""One arm of `openpi-flash bench model`, in a process of its own: loads a random model, times it, prints JSON.

`python -m openpi_flash_cli.bench_arm JOB`, JOB being what bench.py's `start` makes. The last line of the output counts.
"""

import gc
import itertools
import json
import logging
import math
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from openpi_flash_models.checkpoints.layout import jax_shapes, torch_shapes
from openpi_flash_models.checkpoints.synthetic import distribution
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.realtime import Continuation, Method, hard_mask, soft_mask
from openpi_flash_models.request import Backend, ModelBatch

from openpi_flash_cli.bench import MAX_TOKENS, NUM_STEPS, NUM_VIEWS, PROMPT_BUCKET, PROMPT_TOKENS, SIZES
from openpi_flash_cli.scene import camera_picture

if TYPE_CHECKING:
    from openpi_flash_models.planner.decoder import Batch

WARM_UP_CALLS = 3
TILE = 1_048_573  # a prime, so that no two rows of a matrix are alike


class RandomSource:
    """A checkpoint in bfloat16 that is never written: a million normal numbers, again and again, scaled for each."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        tile = np.random.default_rng(0).standard_normal(TILE, np.float32)
        self._tile = np.concatenate([tile, tile])

    def names(self) -> Iterable[str]:
        return sorted(self._shapes, key=lambda name: -math.prod(self._shapes[name]))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16)

    def read(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        mean, std = distribution(name, shape)
        offset, count = zlib.crc32(name.encode()) % TILE, min(math.prod(shape), TILE)
        tile = self._tile[offset : offset + count] * np.float32(std) + np.float32(mean)
        return np.resize(tile.astype(ml_dtypes.bfloat16), shape)

    def release(self, name: str) -> None:
        pass

    def close(self) -> None:
        pass


def main() -> None:
    job = json.loads(sys.argv[1])
    config, arm = SIZES[job["size"]], job["arm"]
    warnings = collected_warnings()
    is_planner = arm["backend"] == "planner"
    result = measure_planner(config, job) if is_planner else measure_policy(config, job, arm)
    print(json.dumps({**result, "warnings": warnings}))


def collected_warnings() -> list[str]:
    """What the models log from here on: which kernels are off, which shapes are in no CUDA graph."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("openpi_flash_models").addHandler(handler)
    return found


def measure_policy(config: ModelConfig, job: dict[str, Any], arm: dict[str, Any]) -> dict[str, Any]:
    """Times, peak memory and rates of one backend; its actions of a batch of 1 go to the file `job["actions"]`."""
    options = {"precision": "bfloat16", **arm}
    framework, continues = options.pop("backend"), options.pop("continues", None)
    is_float32 = options["precision"] == "float32"
    backend: Any
    if framework == "torch":
        from openpi_flash_models.torch import load as load_torch

        started = time.perf_counter()
        backend = load_torch(config, RandomSource(torch_shapes(config)), device=job["device"], **options)
        rates: Callable[[str, str], dict[str, Any]] = torch_rates
        result: dict[str, Any] = {"ops": backend.model.ops.name}
    else:
        from openpi_flash_models.jax import load as load_jax

        started = time.perf_counter()
        backend = load_jax(config, RandomSource(jax_shapes(config)), device=jax_platform(job["device"]), **options)
        rates = jax_rates
        result = {}
    result["load_s"] = time.perf_counter() - started
    # A float32 model is there to compare with: a batch of 1 is enough of it.
    batches = job["batches"][:1] if is_float32 else job["batches"]
    runs = min(job["runs"], 10) if is_float32 else job["runs"]
    started = time.perf_counter()
    for size in batches:
        backend.sample_actions(batch_of(config, size, continues))
    result["first_calls_s"] = time.perf_counter() - started
    wait_for_turn(job)
    np.save(job["actions"], backend.sample_actions(batch_of(config, 1, continues)))
    gc.freeze()
    result["batches"] = {size: percentiles(call(backend, batch_of(config, size, continues)), runs) for size in batches}
    result["peak_bytes"] = peak_bytes(framework, backend.device)
    if job["profile"] and framework == "torch" and not is_float32:
        result["profile"] = profile(call(backend, batch_of(config, 1, continues)))
    return {**result, **rates(job["device"], options["precision"])}


def measure_planner(config: ModelConfig, job: dict[str, Any]) -> dict[str, Any]:
    """Times of the first token, of each further one, and of MAX_TOKENS; no token ends a subtask."""
    import jax
    from openpi_flash_models.planner.decoder import load_decoder
    from openpi_flash_models.planner.vocabulary import EOS

    result: dict[str, Any] = {}
    started = time.perf_counter()
    allowed = np.arange(config.vocab_size) != EOS
    source = RandomSource(jax_shapes(config))
    decoder = load_decoder(config, source, allowed, device=jax_platform(job["device"]), precision="bfloat16")
    result["load_s"] = time.perf_counter() - started
    batch = planner_batch(config)
    first: list[float] = []
    whole: list[float] = []

    def write() -> None:
        began = time.perf_counter()
        draft = decoder.start(batch)
        jax.block_until_ready(draft.written)
        first.append(time.perf_counter() - began)
        tokens = decoder.advance(draft).token_ids()
        whole.append(time.perf_counter() - began)
        if len(tokens[0]) != MAX_TOKENS:
            raise RuntimeError(f"{len(tokens[0])} tokens were written, {MAX_TOKENS} expected")

    started = time.perf_counter()
    write()
    result["first_calls_s"] = time.perf_counter() - started
    wait_for_turn(job)
    first.clear()
    whole.clear()
    gc.freeze()
    for _ in range(job["runs"]):
        write()
    further = [(all_of - one) / (MAX_TOKENS - 1) for one, all_of in zip(first, whole, strict=True)]
    result["first_token"], result["further_token"] = summary(first), summary(further)
    result[f"all_{MAX_TOKENS}_tokens"] = summary(whole)
    result["peak_bytes"] = peak_bytes("jax", decoder.device)
    return {**result, **jax_rates(job["device"], "bfloat16")}


def wait_for_turn(job: dict[str, Any]) -> None:
    """Says that everything is loaded and compiled; returns when nobody else uses the device."""
    Path(job["ready"]).touch()
    sys.stdin.readline()


def planner_batch(config: ModelConfig) -> "Batch":
    """One request for MAX_TOKENS, greedy."""
    from openpi_flash_models.planner.decoder import Batch

    request = batch_of(config, 1)
    return Batch(
        images=request.images,
        tokens=request.tokens,
        token_mask=request.token_mask,
        max_tokens=np.full(1, MAX_TOKENS, np.int32),
        temperature=np.zeros(1, np.float32),
        top_k=np.zeros(1, np.int32),
        seeds=np.zeros((1, 2), np.uint32),
    )


def batch_of(config: ModelConfig, size: int, continues: str | None = None) -> ModelBatch:
    """Pictures as of cameras, and noise: the same for every arm."""
    rng = np.random.default_rng(0)
    side, length = config.vision.image_size, PROMPT_BUCKET
    views = np.stack([camera_picture(view, 0, height=side, width=side) for view in range(NUM_VIEWS)])
    return ModelBatch(
        images=np.stack([views] * size),
        tokens=rng.integers(0, config.vocab_size, (size, length), np.int32),
        token_mask=np.broadcast_to(np.arange(length) < PROMPT_TOKENS, (size, length)).copy(),
        state=rng.uniform(-1, 1, (size, config.action_dim)).astype(np.float32),
        noise=rng.standard_normal((size, config.action_horizon, config.action_dim), np.float32),
        num_steps=NUM_STEPS,
        **({} if continues is None else continuation(config, size, Method(continues))),
    )


def continuation(config: ModelConfig, size: int, method: Method) -> dict[str, Any]:
    """A tenth of the previous chunk is carried out, and another before the answer."""
    horizon, tenth = config.action_horizon, config.action_horizon // 10
    mask = soft_mask(horizon, tenth, tenth) if method is Method.GUIDED else hard_mask(horizon, tenth)
    actions = np.random.default_rng(1).standard_normal((size, horizon, config.action_dim), np.float32)
    return {"continues": method, "continuation": Continuation(actions, np.stack([mask] * size))}


def call(backend: Backend, batch: ModelBatch) -> Callable[[], object]:
    return lambda: backend.sample_actions(batch)


def percentiles(function: Callable[[], object], runs: int) -> dict[str, float]:
    """Times of a function that waits for its device, after a few calls that do not count."""
    for _ in range(WARM_UP_CALLS):
        function()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return summary(times)


def summary(times_s: list[float]) -> dict[str, float]:
    return {f"p{share}_ms": float(np.percentile(times_s, share)) * 1e3 for share in (50, 95, 99)}


def torch_rates(device: str, precision: str) -> dict[str, Any]:
    """What the device reaches at its best: a large copy (bytes read), and a square product."""
    import torch

    is_cuda = device == "cuda"
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    side, copied = (8192, 1 << 30) if is_cuda else (1024, 1 << 26)
    # Zeros and ones would be multiplied faster: they take less power.
    factor = torch.randn(side, side, device=device).to(dtype)
    buffer = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(buffer)

    def timed(function: Callable[[], object]) -> float:
        def waited() -> None:
            function()
            if is_cuda:
                torch.cuda.synchronize()

        return percentiles(waited, 10)["p50_ms"] / 1e3

    return {
        "device_name": torch.cuda.get_device_name() if is_cuda else f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda if is_cuda else None},
        "matmul_flops_per_s": 2 * side**3 / timed(lambda: factor @ factor),
        # A copy reads and writes.
        "copy_bytes_per_s": 2 * copied / timed(lambda: target.copy_(buffer)),
    }


def jax_platform(device: str) -> str | None:
    """JAX's name of `cpu`; None for its own choice of an accelerator."""
    return "cpu" if device == "cpu" else None


def jax_rates(device_name: str, precision: str) -> dict[str, Any]:
    """As `torch_rates`, by JAX."""
    import jax
    import jax.numpy as jnp

    device = jax.devices(jax_platform(device_name))[0]
    is_cpu = device.platform == "cpu"
    dtype = jnp.float32 if precision == "float32" else jnp.bfloat16
    side, copied = (1024, 1 << 26) if is_cpu else (8192, 1 << 30)
    factor = jax.device_put(np.random.default_rng(0).standard_normal((side, side), np.float32), device).astype(dtype)
    buffer = jax.device_put(np.ones(copied // 4, np.float32), device)
    square, increment = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    matmul_s = percentiles(lambda: square(factor).block_until_ready(), 10)["p50_ms"] / 1e3
    copy_s = percentiles(lambda: increment(buffer).block_until_ready(), 10)["p50_ms"] / 1e3
    return {
        "device_name": processor() if is_cpu else device.device_kind,
        "versions": {"jax": jax.__version__},
        "matmul_flops_per_s": 2 * side**3 / matmul_s,
        "copy_bytes_per_s": 2 * copied / copy_s,
    }


def peak_bytes(framework: str, device: Any) -> int:
    """Most memory of the device that was in use; on a CPU, of the process."""
    if framework == "torch" and device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved(device))
    if framework == "jax" and device.platform != "cpu":
        return int(device.memory_stats()["peak_bytes_in_use"])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def profile(function: Callable[[], object]) -> dict[str, Any]:
    """Kernels of one call on a GPU, with the gaps between them; on a CPU, operations."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        function()
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    totals: dict[str, list[float]] = {}
    for event in kernels or profiler.events():
        spent = event.time_range.elapsed_us() if kernels else event.self_cpu_time_total
        totals.setdefault(event.name, []).append(spent / 1e3)
    longest = sorted(totals.items(), key=lambda item: -sum(item[1]))
    result: dict[str, Any] = {
        "what": "kernels" if kernels else "operations",
        "count": sum(map(len, totals.values())),
        "busy_ms": sum(map(sum, totals.values())),
        "longest": [{"name": name, "count": len(each), "total_ms": sum(each)} for name, each in longest],
    }
    if kernels:
        spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
        result["gaps_ms"] = sum(max(0.0, b[0] - a[1]) for a, b in itertools.pairwise(spans)) / 1e3
    return result


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
