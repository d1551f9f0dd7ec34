"""The JAX model at full size, compiled in several ways: what each costs to compile, and what a batch of 1 then takes.

    python benchmarks/jax_variants.py --variants list:default list:cublaslt stack:default --planner --stop-after 120

A variant is a form of the layers (`list`, `stack`: see jax/weights.py) and a set of options of XLA (OPTIONS below) that
programs are compiled with; what the installed XLA does not know of them is left out, and said. Weights are random and
read once. Every line is printed as soon as it is known. `host` is how long a call keeps the host before it waits for
the device: where that is all of the time, the device waits for the host. `cosine` compares the actions with those of
the first variant. On a CPU a tiny model shows that all of it runs.
"""

import argparse
import functools
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from openpi_flash_cli.bench import MAX_TOKENS, NUM_STEPS, SIZES
from openpi_flash_cli.bench_arm import RandomSource, batch_of, percentiles, planner_batch
from openpi_flash_models.checkpoints.layout import jax_shapes
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.jax.backend import JaxBackend, parse_placement
from openpi_flash_models.jax.compilation import Options
from openpi_flash_models.jax.model import Weights
from openpi_flash_models.jax.weights import LAYERS, VLM, read_weights
from openpi_flash_models.planner.decoder import Batch, Decoder
from openpi_flash_models.planner.vocabulary import EOS

GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN"
OPTIONS: dict[str, Options] = {
    "default": {},
    # cuBLASLt adds biases and computes GELU behind its products, and has more kernels to choose from.
    "cublaslt": {"xla_gpu_enable_cublaslt": True},
    # Products by cuBLAS alone, none by kernels of XLA's own.
    "cublas": {"xla_gpu_enable_triton_gemm": False},
    "cublas+lt": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_cublaslt": True},
    # Loops and conditions within CUDA graphs: the whole call is one.
    "while": {"xla_gpu_enable_command_buffer": f"{GRAPHS},WHILE,CONDITIONAL"},
    "while+lt": {
        "xla_gpu_enable_command_buffer": f"{GRAPHS},WHILE,CONDITIONAL",
        "xla_gpu_enable_cublaslt": True,
    },
    # No CUDA graphs: what they gain.
    "no-graphs": {"xla_gpu_graph_min_graph_size": 1_000_000},
    # Kernels that do not need each other side by side, within a graph.
    "concurrent": {"xla_gpu_graph_enable_concurrent_region": True},
    # All flow steps in a row, without a loop.
    "unroll-steps": {"xla_gpu_enable_while_loop_unrolling": "WHILE_LOOP_UNROLLING_FULL_UNROLL"},
    # More shapes of kernels are tried: minutes.
    "exhaustive": {"xla_gpu_exhaustive_tiling_search": True},
}
FORMS = ("list", "stack")
RUNS = 30


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    device, dtype = parse_placement(args.device, "bfloat16")
    config = SIZES[args.size or ("tiny" if device.platform == "cpu" else "full")]
    forms: dict[str, Weights] = {}
    first = args.variants[0].partition(":")[0]
    source = RandomSource(jax_shapes(config))
    forms[first] = read_weights(config, source, dtype, device, stacked=first == "stack")
    say(f"{device.device_kind}, JAX {jax.__version__}: loaded in {time.perf_counter() - started:.1f} s")
    expected: list[np.ndarray] = []
    for variant in args.variants:
        if args.stop_after and time.perf_counter() - started > args.stop_after:
            say(f"{variant}: left out, there is no time")
            continue
        form, _, name = variant.partition(":")
        if form not in forms:
            forms[form] = stacked(forms[first]) if form == "stack" else listed(forms[first])
        options = known_options(device, OPTIONS[name or "default"])
        try:
            if not args.no_actions:
                backend = JaxBackend(config, forms[form], device, num_steps=NUM_STEPS, options=options)
                time_actions(variant, backend, expected)
                if args.profile:
                    profile(functools.partial(backend.sample_actions, batch_of(config, 1)))
            if args.planner:
                allowed = np.arange(config.vocab_size) != EOS
                vlm = {part: weights for part, weights in forms[form].items() if part in VLM}
                decoder = Decoder(config, vlm, device, allowed, options=options)
                time_planner(variant, config, decoder)
                if args.profile:
                    profile(functools.partial(write, decoder, planner_batch(config)))
        except Exception as error:  # the next one may do
            say(f"{variant}: {type(error).__name__}: {str(error)[:400]}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [f"{form}:{name}" for form in FORMS for name in OPTIONS]
    parser.add_argument("--variants", nargs="+", choices=known, metavar="FORM:OPTIONS", default=["list:default"])
    parser.add_argument("--planner", action="store_true", help="time a planner, too")
    parser.add_argument("--no-actions", action="store_true", help="time no actions")
    parser.add_argument(
        "--profile", action="store_true", help="show the kernels of a call; graphs are taken apart for it"
    )
    parser.add_argument("--stop-after", type=float, metavar="S", help="begin no variant later than this")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: full, on a CPU tiny")
    parser.add_argument("--device", help="a JAX platform")
    return parser.parse_args()


def time_actions(variant: str, backend: JaxBackend, expected: list[np.ndarray]) -> None:
    batch = batch_of(backend.config, 1)
    started = time.perf_counter()
    actions = backend.sample_actions(batch)
    compiled_s = time.perf_counter() - started
    times = percentiles(lambda: backend.sample_actions(batch), RUNS)
    inputs, schedule = backend.upload(batch), backend._schedule(NUM_STEPS)
    host_ms = []
    for _ in range(10):
        started = time.perf_counter()
        with jax.default_matmul_precision("highest"):
            running = backend._run(backend.config, backend.weights, schedule, inputs, None)
        host_ms.append((time.perf_counter() - started) * 1e3)
        running.block_until_ready()
    expected.append(actions)
    cosine = np.vdot(expected[0], actions) / np.linalg.norm(expected[0]) / np.linalg.norm(actions)
    figures = f"p50 {times['p50_ms']:.2f} ms, p95 {times['p95_ms']:.2f}, host {np.median(host_ms):.2f}"
    say(f"{variant}: actions: first call {compiled_s:.1f} s, {figures}, cosine {cosine:.5f}")


def time_planner(variant: str, config: ModelConfig, decoder: Decoder) -> None:
    firsts, wholes = zip(*(write(decoder, planner_batch(config)) for _ in range(RUNS + 1)), strict=True)
    first, whole = np.median(firsts[1:]), np.median(wholes[1:])
    further = (whole - first) / (MAX_TOKENS - 1)
    figures = f"first token {first:.2f} ms, further {further:.2f} each, {MAX_TOKENS} tokens {whole:.1f}"
    say(f"{variant}: planner: first call {wholes[0] / 1e3:.1f} s, {figures}")


def write(decoder: Decoder, batch: Batch) -> tuple[float, float]:
    """Milliseconds until the first token, and until the last."""
    started = time.perf_counter()
    draft = decoder.start(batch)
    jax.block_until_ready(draft.written)
    first = time.perf_counter()
    decoder.advance(draft).token_ids()
    return (first - started) * 1e3, (time.perf_counter() - started) * 1e3


def known_options(device: jax.Device, wanted: Options) -> Options:
    """Those that the installed XLA takes, found out by trying: versions differ, and an unknown one is an error."""
    known: Options = {}
    for name, value in wanted.items():
        try:
            with jax.default_device(device):
                jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(0.0).compile()
        except Exception as error:  # whatever it is, the others are worth trying
            say(f"XLA does not take the option {name}={value}: {error}")
        else:
            known[name] = value
    return known


def profile(function: Callable[[], object]) -> None:
    """Shows which kernels a call spends its time in."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            function()
        (path,) = Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        spent: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for plane in data.planes:
            for line in plane.lines if "GPU" in plane.name else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    spent[event.name] += event.duration_ns
                    count[event.name] += 1
    say(f"    {count.total()} kernels of one call, {spent.total() / 1e6:.2f} ms; those that take longest:")
    for name, nanoseconds in spent.most_common(25):
        say(f"    {nanoseconds / 1e6:7.3f} ms {count[name]:5d} x {name[:110]}")


def stacked(weights: Weights) -> Weights:
    """Layers in lists as stacks; on the device, which holds both."""
    return with_layers(weights, lambda layers: jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers))


def listed(weights: Weights) -> Weights:
    """The other way."""

    def apart(stack: Weights) -> list[Weights]:
        depth = len(next(iter(stack.values())))
        return [{name: array[i] for name, array in stack.items()} for i in range(depth)]

    return with_layers(weights, apart)


def with_layers(weights: Weights, convert: Callable[[Any], Any]) -> Weights:
    converted: Weights = {name: dict(part) if name == "vision" else part for name, part in weights.items()}
    for *outer, group in LAYERS:
        holder = functools.reduce(dict.__getitem__, outer, converted)
        holder[group] = convert(holder[group])
    return converted


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
