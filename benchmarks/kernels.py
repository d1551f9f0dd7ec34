"""Where the time of the PyTorch model goes on a GPU: each operation alone, at the sizes of a request, without gaps.

Every line is one operation of one layer, called once with the weights of each layer, so that no cache holds them, all
in one CUDA graph. Beside it, the same in plain PyTorch, and the rates that the fastest reached: of a flow step bytes
count, of the prefix arithmetic. The kernels of a flow step's layer are timed one after the other, as they overlap, each
in turn shared out to programs in other ways (TILES). Attention of the prefix and of the views is timed in tiles of
several sizes, rotations with more and fewer heads of a token to a program. Without a GPU it times a tiny model, to show
that it runs.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from openpi_flash_cli.bench import NUM_VIEWS, PROMPT_BUCKET, PROMPT_TOKENS, SIZES
from openpi_flash_models.config import GemmaConfig, ModelConfig, VisionConfig
from openpi_flash_models.torch import expert_kernels
from openpi_flash_models.torch.attention_kernels import PREFIX_TILES, Tiles, tiled_attend_prefix
from openpi_flash_models.torch.fused import FUSED
from openpi_flash_models.torch.kernels import fused_rotate_into_cache
from openpi_flash_models.torch.ops import REFERENCE, Norm, Ops, Span, Stream, rope_table
from torch import Tensor

ROTATIONS = ((2, 1), (2, 2), (5, 2), (5, 4), (10, 4))
"""Heads of a token to a program, and warps."""


def tiles(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    """One dict for each position of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in zip(*choices.values(), strict=True)]


TILES: dict[str, list[dict[str, int]]] = {
    "norm_qkv": tiles(BLOCK_OUT=(16, 16, 16, 32), BLOCK_WIDTH=(128, 128, 256, 128), num_stages=(4, 6, 3, 4)),
    "attend_suffix": tiles(
        BLOCK_KEYS=(64, 64, 32, 64, 64),
        num_warps=(4, 4, 4, 8, 4),
        num_stages=(2, 1, 3, 2, 2),
        splits=(14, 14, 14, 14, 7),
    ),
    "out": tiles(
        BLOCK_OUT=(16, 16, 16, 32, 32),
        BLOCK_WIDTH=(128, 128, 256, 128, 128),
        num_stages=(6, 4, 4, 4, 4),
        SPLITS=(1, 2, 1, 4, 2),
    ),
    "norm_geglu": tiles(BLOCK_OUT=(32, 32, 32, 64), BLOCK_WIDTH=(128, 128, 128, 128), num_stages=(4, 3, 5, 3)),
    "down": tiles(
        BLOCK_OUT=(32, 32, 32, 16, 32),
        BLOCK_WIDTH=(128, 128, 256, 128, 128),
        num_stages=(6, 4, 3, 6, 4),
        SPLITS=(4, 4, 4, 2, 8),
    ),
}
"""How each kernel of a layer could be shared out to programs."""

SWITCHES: list[dict[str, int]] = [{"PREFETCH": 0}, {"OVERLAP": 0, "launch_pdl": 0, "PREFETCH": 0}]
"""What all of them could do without: fetching weights early, and beginning before the kernel before them has ended."""

REPLAYS = 10

Call = Callable[[int], object]
"""An operation with the weights of one layer."""


class Case(NamedTuple):
    """One operation.

    Attributes:
        name: part of the model and operation.
        calls: by implementation.
        flops: of a call.
        num_bytes: that a call reads and writes at least.
    """

    name: str
    calls: dict[str, Call]
    flops: float
    num_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SIZES["full" if device.type == "cuda" else "tiny"]
    rows = []
    with torch.inference_mode():
        for batch in arguments.batches:
            found, times = cases(config, batch, device), None
            while case := next_case(found, times):
                times = time_case(case, config.vlm.depth, device) if arguments.only in case.name else {}
                if times:
                    rows.append({"batch": batch, **case._asdict(), "calls": times})
                    best = min(times.values())
                    shown = "  ".join(f"{name} {us:.1f}" for name, us in times.items())
                    rates = f"{case.flops / best / 1e6:.1f} TFLOP/s, {case.num_bytes / best / 1e3:.0f} GB/s"
                    print(f"batch {batch}  {case.name:24} {rates:30} µs: {shown}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


Cases = Generator[Case, dict[str, float] | None, None]
"""Cases, each of which may be told the times of the one before it."""


def next_case(cases: Cases, times: dict[str, float] | None) -> Case | None:
    try:
        return cases.send(times)
    except StopIteration:
        return None


def time_case(case: Case, layers: int, device: torch.device) -> dict[str, float]:
    """Microseconds of each call that does not fail."""
    times = {}
    for name, call in case.calls.items():
        try:
            times[name] = timed(call, layers, device)
        except Exception as error:  # the others are worth the time on a GPU
            print(f"{case.name}, {name}: {type(error).__name__}: {error}")
    return times


def cases(config: ModelConfig, batch: int, device: torch.device) -> Cases:
    prefix = NUM_VIEWS * config.vision.num_tokens + PROMPT_BUCKET
    valid = prefix - PROMPT_BUCKET + PROMPT_TOKENS
    lengths = torch.full((batch,), valid, dtype=torch.int32, device=device)
    capacity = prefix + config.action_horizon
    yield from vision_cases(config.vision, batch * NUM_VIEWS, device, layers=config.vlm.depth)
    yield from expert_cases("prefix", config.vlm, batch, prefix, lengths, capacity=capacity)
    horizon = config.action_horizon
    yield from expert_cases("step", config.expert, batch, horizon, lengths + horizon, capacity=capacity)


def vision_cases(vision: VisionConfig, views: int, device: torch.device, *, layers: int) -> Cases:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    x, y = random(views, vision.num_tokens, vision.width), random(views, vision.num_tokens, vision.width)
    products = {
        "qkv": (vision.width, 3 * vision.width),
        "out": (vision.width, vision.width),
        "fc1": (vision.width, vision.mlp_dim),
        "fc2": (vision.mlp_dim, vision.width),
    }
    for name, (wide_in, wide_out) in products.items():
        rows = random(views, vision.num_tokens, wide_in)
        weights = [random(wide_out, wide_in) for _ in range(layers)]
        biases = [random(wide_out) for _ in range(layers)]
        costs = product_costs(views * vision.num_tokens, wide_in, wide_out)
        # A case is timed before the next is made.
        yield Case(f"vision {name}", {"cuBLAS": lambda i: F.linear(rows, weights[i], biases[i])}, *costs)  # noqa: B023
        if name == "fc1":
            yield both(
                "vision fc1 and gelu",
                lambda ops: lambda i: ops.linear_gelu(x, weights[i], biases[i]),  # noqa: B023
                *costs,
            )
    yield both("vision add_layer_norm", lambda ops: lambda _: ops.add_layer_norm(x, y, None, None), 0, 4 * x.nbytes)


def expert_cases(part: str, gemma: GemmaConfig, batch: int, tokens: int, lengths: Tensor, *, capacity: int) -> Cases:
    device, layers = lengths.device, gemma.depth

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    heads = gemma.num_heads + 2 * gemma.num_kv_heads
    products = {
        "qkv": (gemma.width, heads * gemma.head_dim),
        "out": (gemma.num_heads * gemma.head_dim, gemma.width),
        "gate_up": (gemma.width, 2 * gemma.mlp_dim),
        "down": (gemma.mlp_dim, gemma.width),
    }
    for name, (wide_in, wide_out) in products.items():
        x, weights = random(batch, tokens, wide_in), [random(wide_out, wide_in) for _ in range(layers)]
        flops, num_bytes = product_costs(batch * tokens, wide_in, wide_out)
        # A case is timed before the next is made.
        yield Case(f"{part} {name}", {"cuBLAS": lambda i: F.linear(x, weights[i])}, flops, num_bytes)  # noqa: B023

    x, y, gate_up = (
        random(batch, tokens, gemma.width),
        random(batch, tokens, gemma.width),
        random(batch, tokens, 2 * gemma.mlp_dim),
    )
    vectors = [random(gemma.width, dtype=torch.float32) for _ in range(3)] if part == "step" else [None] * 3
    yield both(f"{part} add_rms_norm", lambda ops: lambda _: ops.add_rms_norm(x, y, *vectors), 0, 4 * x.nbytes)
    yield both(f"{part} geglu", lambda ops: lambda _: ops.geglu(gate_up), 0, 1.5 * gate_up.nbytes)

    caches = [random(2, batch, capacity, gemma.num_kv_heads, gemma.head_dim) for _ in range(layers)]
    qkv, q = random(batch, tokens, heads * gemma.head_dim), random(batch, tokens, gemma.num_heads, gemma.head_dim)
    positions = torch.arange(tokens, device=device)[None]
    if part == "step":
        positions = positions + lengths[:, None] - tokens
    rope = rope_table(positions, gemma.head_dim)
    rotation = both(
        f"{part} rotate_into_cache",
        lambda ops: lambda i: ops.rotate_into_cache(qkv, rope, positions, caches[i]),
        0,
        2 * qkv.nbytes,
    )
    if device.type == "cuda":
        for each, warps in ROTATIONS:
            rotate = functools.partial(fused_rotate_into_cache, num_heads_each=each, num_warps=warps)
            rotation.calls[f"{each} heads, {warps} warps"] = lambda i, rotate=rotate: rotate(
                qkv, rope, positions, caches[i]
            )
    yield rotation

    keys = int(lengths[0])
    flops, num_bytes = 4.0 * q.numel() * keys, 2 * q.nbytes + caches[0].nbytes * keys / capacity
    if part == "prefix":
        attention = both(
            "prefix attention", lambda ops: lambda i: ops.attend_prefix(q, caches[i], lengths), flops, num_bytes
        )
        if device.type == "cuda":
            for tiles in PREFIX_TILES:
                attend = functools.partial(tiled_attend_prefix, q, lengths=lengths, tiles=tiles)
                attention.calls[name_of(tiles)] = lambda i, attend=attend: attend(cache=caches[i])
        yield attention
        return
    yield from layer_cases(gemma, x, caches, Span(positions, lengths, rope))


def layer_cases(gemma: GemmaConfig, x: Tensor, caches: list[Tensor], span: Span) -> Cases:
    """An expert's layer, from one to the next: each kernel in turn shared out in every way of TILES, and then in the
    fastest."""
    device, layers = x.device, gemma.depth
    width, heads_width = gemma.width, gemma.num_heads * gemma.head_dim
    wide = heads_width + 2 * gemma.num_kv_heads * gemma.head_dim

    def matrices(size_out: int, size_in: int) -> list[Tensor]:
        return [torch.randn(size_out, size_in, device=device).to(x.dtype) * size_in**-0.5 for _ in range(layers)]

    qkv, out, gate_up, down = (
        matrices(*shape)
        for shape in ((wide, width), (width, heads_width), (2 * gemma.mlp_dim, width), (width, gemma.mlp_dim))
    )
    norms = [
        Norm(*torch.rand(3, width, device=device), torch.rand(size, device=device))
        for size in (wide, 2 * gemma.mlp_dim)
    ]

    def layer(ops: Ops, chosen: dict[str, dict[str, int]], *, many_rows: int = 1 << 20) -> Call:
        streams: list[Stream] = []

        def call(i: int) -> object:
            expert_kernels.MANY_ROWS = many_rows
            if i == 0:
                streams[:] = [ops.stream(x, norms[0])]
            (stream,) = streams
            kw = {name: chosen.get(name, {}) for name in TILES}
            q = ops.norm_qkv(stream, norms[0], qkv[i], span, caches[i], **kw["norm_qkv"])
            attended = ops.attend_suffix(q, caches[i], span.lengths, **kw["attend_suffix"]).flatten(2)
            stream = ops.project_add(attended, out[i], stream, norms[0].gate, norms[1], **kw["out"])
            inner = ops.norm_geglu(stream, norms[1], gate_up[i], **kw["norm_geglu"])
            streams[:] = [ops.project_add(inner, down[i], stream, norms[1].gate, norms[0], **kw["down"])]
            return streams

        return call

    products = [product_costs(x.numel() // width, len(each[0][0]), len(each[0])) for each in (qkv, out, gate_up, down)]
    flops, num_bytes = map(sum, zip(*products, strict=True))
    calls = {"plain": layer(REFERENCE, {})}
    if device.type == "cuda":
        calls |= {"fused": layer(FUSED, {}), "with cuBLAS": layer(FUSED, {}, many_rows=0)}
        for splits in (1, 2, 4, 7):
            calls[f"with cuBLAS, {splits} splits"] = layer(FUSED, {"attend_suffix": {"splits": splits}}, many_rows=0)
    yield Case("step layer", calls, flops, num_bytes)
    if device.type == "cpu" or len(x) > 1:
        return
    best: dict[str, dict[str, int]] = {}
    for name, variants in TILES.items():
        taken = {",".join(f"{key}={value}" for key, value in each.items()): each for each in variants}
        calls = {shown: layer(FUSED, {**best, name: each}) for shown, each in taken.items()}
        if times := (yield Case(f"step layer by {name}", calls, flops, num_bytes)):
            best[name] = taken[min(times, key=lambda shown: times[shown])]
    calls = {"fastest": layer(FUSED, best)}
    for switches in SWITCHES:
        chosen = {name: {**best.get(name, {}), **switches} for name in TILES}
        chosen["attend_suffix"].pop("PREFETCH")
        calls[",".join(f"{key}={value}" for key, value in switches.items())] = layer(FUSED, chosen)
    yield Case(f"step layer, {best}", calls, flops, num_bytes)


def name_of(tiles: Tiles) -> str:
    return f"{tiles.rows}x{tiles.keys} w{tiles.warps} s{tiles.stages}"


def product_costs(rows: int, wide_in: int, wide_out: int) -> tuple[float, float]:
    return 2.0 * rows * wide_in * wide_out, 2.0 * (wide_in * wide_out + rows * (wide_in + wide_out))


def both(name: str, call_with: Callable[[Ops], Call], flops: float, num_bytes: float) -> Case:
    """An operation as a kernel of ours, where there is a GPU, and in plain PyTorch."""
    calls = {"fused": call_with(FUSED)} if torch.cuda.is_available() else {}
    return Case(name, {**calls, "plain": call_with(REFERENCE)}, flops, num_bytes)


def timed(call: Call, layers: int, device: torch.device) -> float:
    """Microseconds of one call."""

    def all_layers() -> None:
        for i in range(layers):
            call(i)

    if device.type == "cpu":
        started = time.perf_counter()
        all_layers()
        return (time.perf_counter() - started) / layers * 1e6
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        all_layers()
        with torch.cuda.graph(graph, stream=stream):
            all_layers()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 2)]
        for event in events:
            graph.replay()
            event.record()
    stream.synchronize()
    # Of the time between the ends of replays, the first of which warmed up.
    times = [one.elapsed_time(next_one) for one, next_one in itertools.pairwise(events[1:])]
    return statistics.median(times) / layers * 1e3


if __name__ == "__main__":
    main()
