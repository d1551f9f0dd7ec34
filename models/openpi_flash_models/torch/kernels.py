"""The operations of ops.py as Triton kernels, one launch each.

A flow step is short: on a GPU its time is that of its launches and of what they read and write between the products.
`FUSED` needs a GPU, Triton, and a C compiler for its launcher. No fused operation can be differentiated. Shapes are
those of ops.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from openpi_flash_models.torch.ops import (
    FP8,
    FP8_MAX,
    NORM_EPSILON,
    Norm,
    Ops,
    Rope,
    Span,
    Stream,
    attend_prefix,
)

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # there is none for this platform: the reference serves
    triton = None


MANY_ROWS = 64
"""Tokens of a batch up to which one kernel of ours for a product and what surrounds it is faster than cuBLAS."""

HOPPER_TILES = {
    "norm_qkv": {"BLOCK_OUT": 32, "BLOCK_WIDTH": 128, "num_stages": 4},
    "attend_suffix": {"BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 2},
    "out": {"BLOCK_OUT": 16, "BLOCK_WIDTH": 256, "num_stages": 4, "SPLITS": 1},
    "norm_geglu": {"BLOCK_OUT": 32, "BLOCK_WIDTH": 128, "num_stages": 4},
    "down": {"BLOCK_OUT": 32, "BLOCK_WIDTH": 256, "num_stages": 3, "SPLITS": 4},
}
"""How the kernels of a flow step are shared out to programs where this is fastest, found by benchmarks/kernels.py."""

ATTEND_SPLITS = 14
"""Programs to which the keys of one robot's flow step are shared out: about one for each block of keys."""

OVERLAP_CAPABILITY = 90
"""Of GPUs on which a kernel can begin before the one before it has ended (programmatic dependent launch)."""

HOPPER = 90
"""Compute capability of H100 and H200."""

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """How a kernel of attention divides its work.

    Attributes:
        rows: (token, head) pairs of a program.
        keys: that it multiplies at a time.
        warps: of a program.
        stages: how many tiles of keys are on their way or in use.
    """

    rows: int
    keys: int
    warps: int
    stages: int


PREFIX_TILES = (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 1), Tiles(128, 64, 8, 2))
"""For attention of the prefix on Hopper: first the fastest where every program has a multiprocessor to itself, then the
fastest where two share one."""

PREFIX_ROWS = 64 * 132
"""Up to which each has one to itself."""


def fused_rms_norm(x: Tensor, factor: Tensor | None, shift: Tensor | None) -> Tensor:
    return _launch_norm(x, None, None, factor, shift)[1]


def fused_add_rms_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, factor: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _launch_norm(x, y, gate, factor, shift)


def _launch_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, factor: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    total = x if y is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    width = x.shape[-1]
    _norm_kernel[(x.numel() // width,)](
        x,
        x if y is None else y.contiguous(),
        x if gate is None else gate,
        x if factor is None else factor,
        x if shift is None else shift,
        total,
        normed,
        width,
        _row_stride(gate, factor, shift),
        EPSILON=NORM_EPSILON,
        ADD=y is not None,
        GATE=gate is not None,
        FACTOR=factor is not None,
        SHIFT=shift is not None,
        BLOCK=triton.next_power_of_2(width),
    )
    return total, normed


def fused_add_layer_norm(x: Tensor, y: Tensor, factor: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    _layer_norm_kernel[(x.numel() // width,)](
        x,
        y.contiguous(),
        x if factor is None else factor,
        x if shift is None else shift,
        total,
        normed,
        width,
        EPSILON=NORM_EPSILON,
        FACTOR=factor is not None,
        SHIFT=shift is not None,
        BLOCK=triton.next_power_of_2(width),
    )
    return total, normed


def addmm_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cuBLASLt's product, which adds the bias and applies GELU, in its tanh form, to what is still in registers."""
    product = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return product.view(*x.shape[:-1], -1)


def fused_rotate_into_cache(
    qkv: Tensor, rope: Rope, positions: Tensor, cache: Tensor, *, num_heads_each: int = 5, num_warps: int = 4
) -> Tensor:
    """A program has `num_heads_each` heads of a token."""
    batch, tokens, _ = qkv.shape
    _, _, capacity, kv_heads, head_dim = cache.shape
    num_heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    q = qkv.new_empty(batch, tokens, num_heads, head_dim)
    cos, sin = (table.contiguous() for table in rope)
    _rotate_kernel[(batch * tokens, triton.cdiv(num_heads + 2 * kv_heads, num_heads_each))](
        qkv.contiguous(),
        cos,
        sin,
        positions.contiguous(),
        q,
        cache,
        tokens,
        capacity,
        tokens if len(cos) > 1 else 0,
        tokens if len(positions) > 1 else 0,
        batch * capacity * kv_heads * head_dim,
        NUM_HEADS=num_heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        HEADS_EACH=num_heads_each,
        BLOCK_HEADS=triton.next_power_of_2(num_heads_each),
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=num_warps,
    )
    return q


def fused_geglu(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    block = min(1024, triton.next_power_of_2(width))
    _geglu_kernel[(gate_up.numel() // (2 * width), triton.cdiv(width, block))](gate_up, out, width, BLOCK=block)
    return out


def fused_attend_suffix(q: Tensor, cache: Tensor, lengths: Tensor, **tiles: int) -> Tensor:
    """The keys of a row are shared out to `splits` programs, since a few queries alone would leave most of a GPU idle;
    a second kernel joins what they found (Dao et al., Flash-Decoding)."""
    q = q.contiguous()
    batch, tokens, num_heads, head_dim = q.shape
    _, _, capacity, kv_heads, _ = cache.shape
    rows = tokens * (num_heads // kv_heads)
    overlap = _overlap(q)
    tile = {"BLOCK_ROWS": 64, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2}
    if q.dtype == torch.float32:
        # Multiplied outside of the tensor cores: the tiles of these would not fit into registers, nor into the shared
        # memory of a consumer's GPU.
        tile |= {"BLOCK_ROWS": 32, "BLOCK_KEYS": 16, "num_warps": 8}
    elif not overlap["OVERLAP"]:  # factors pass through registers
        tile["num_warps"] = 8
    else:
        tile |= HOPPER_TILES["attend_suffix"]
    tile["splits"] = triton.cdiv(ATTEND_SPLITS, batch)  # several robots keep a GPU busy with fewer
    tile |= {"TMA": q.device.type != "cpu" and _is_for_hopper(q)} | overlap | tiles
    splits = tile.pop("splits")
    shares = q.new_empty(splits, batch, kv_heads, rows, head_dim, dtype=torch.float32)
    weights = q.new_empty(2, splits, batch, kv_heads, rows, dtype=torch.float32)
    share = triton.cdiv(triton.cdiv(capacity, tile["BLOCK_KEYS"]), splits) * tile["BLOCK_KEYS"]
    sizes = {"NUM_HEADS": num_heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim}
    block_dim = max(16, triton.next_power_of_2(head_dim))
    keys_values: Any = cache
    if tile["TMA"]:
        matrix = cache.view(-1, kv_heads * head_dim)
        keys_values = TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [tile["BLOCK_KEYS"], block_dim])
    _attend_kernel[(triton.cdiv(rows, tile["BLOCK_ROWS"]), batch * kv_heads, splits)](
        q,
        keys_values,
        lengths,
        shares,
        weights,
        rows,
        capacity,
        batch,
        cache[0].numel(),
        share,
        head_dim**-0.5 * math.log2(math.e),
        **sizes,
        BLOCK_DIM=block_dim,
        **tile,
    )
    out = torch.empty_like(q)
    _join_kernel[(batch * kv_heads * rows,)](
        shares,
        weights,
        out,
        rows,
        batch,
        **sizes,
        SPLITS=splits,
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        BLOCK_DIM=block_dim,
        num_warps=1,
        **{name: tile[name] for name in overlap},
    )
    return out


def hopper_attend_prefix(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """`tiled_attend_prefix` on the GPUs for whose tensor cores and shared memory it is written; others' FlashAttention
    is PyTorch's."""
    attend = tiled_attend_prefix if _is_for_hopper(q) else flash_attend_prefix
    return attend(q, cache, lengths)


def _is_for_hopper(x: Tensor) -> bool:
    return x.dtype != torch.float32 and bool(triton.runtime.driver.active.get_current_target().arch == HOPPER)


def tiled_attend_prefix(q: Tensor, cache: Tensor, lengths: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """FlashAttention whose rows are the (token, head) pairs that share a key head (Dao, FlashAttention-2)."""
    q = q.contiguous()
    batch, tokens, num_heads, head_dim = q.shape
    _, _, capacity, kv_heads, _ = cache.shape
    rows = tokens * (num_heads // kv_heads)
    if q.dtype == torch.float32:
        tiles = Tiles(32, 16, 8, 2)  # as in `fused_attend_suffix`
    elif tiles is None:
        tiles = PREFIX_TILES[0 if rows * batch * kv_heads <= PREFIX_ROWS else 1]
    block_dim = max(16, triton.next_power_of_2(head_dim))
    matrix = cache.view(-1, kv_heads * head_dim)
    out = torch.empty_like(q)
    _tiled_attend_kernel[(triton.cdiv(rows, tiles.rows), batch * kv_heads)](
        q,
        TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [tiles.keys, block_dim]),
        lengths,
        out,
        rows,
        batch,
        capacity,
        head_dim**-0.5 * LOG2_E,
        NUM_HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_ROWS=tiles.rows,
        BLOCK_KEYS=tiles.keys,
        BLOCK_DIM=block_dim,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def flash_attend_prefix(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """PyTorch's FlashAttention, which takes lengths in place of a mask, and half precision alone."""
    if q.dtype == torch.float32:
        return attend_prefix(q, cache, lengths)
    batch, tokens, num_heads, head_dim = q.shape
    capacity = cache.shape[2]
    query_starts, key_starts = (
        torch.arange(0, (batch + 1) * step, step, dtype=torch.int32, device=q.device) for step in (tokens, capacity)
    )
    keys, values = cache.flatten(1, 2)
    # This is what `torch.nn.attention.varlen` calls, which takes lengths and shared key heads from PyTorch 2.12 on.
    attended, *_ = torch.ops.aten._flash_attention_forward(
        q.reshape(-1, num_heads, head_dim),
        keys,
        values,
        query_starts,
        key_starts,
        tokens,
        capacity,
        dropout_p=0.0,
        is_causal=False,
        return_debug_mask=False,
        seqused_k=lengths,
    )
    return cast(Tensor, attended).view(batch, tokens, num_heads, head_dim)


def fused_stream(x: Tensor, norm: Norm) -> Stream:
    x, factor = x.contiguous(), norm.factor
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    if _is_for_cublas(x, rows):
        return Stream(x, fused_rms_norm(x, factor, norm.shift))
    scaled, squares = torch.empty_like(x), x.new_empty(rows, 1, dtype=torch.float32)
    _stream_kernel[(rows,)](
        x,
        x if factor is None else factor,
        scaled,
        squares,
        width,
        _row_stride(factor),
        FACTOR=factor is not None,
        BLOCK=triton.next_power_of_2(width),
        **_overlap(x),
    )
    return Stream(x, scaled, squares)


def fused_embed(actions: Tensor, weight: Tensor, bias: Tensor, norm: Norm, dtype: torch.dtype) -> Stream:
    rows, width = actions.numel() // actions.shape[-1], len(weight)
    if _is_for_cublas(torch.empty(0, dtype=dtype, device=actions.device), rows):
        return fused_stream(F.linear(actions, weight, bias).to(dtype), norm)
    x = actions.new_empty(*actions.shape[:-1], width, dtype=dtype)
    block = 128
    parts = triton.cdiv(width, block)
    scaled, squares = torch.empty_like(x), actions.new_empty(rows, parts)
    _embed_kernel[(rows, parts)](
        actions.contiguous(),
        weight,
        bias,
        x if norm.factor is None else norm.factor,
        x,
        scaled,
        squares,
        width,
        actions.shape[-1],
        _row_stride(norm.factor),
        FACTOR=norm.factor is not None,
        BLOCK_OUT=block,
        BLOCK_WIDTH=triton.next_power_of_2(actions.shape[-1]),
        **_overlap(x),
    )
    return Stream(x, scaled, squares)


def fused_read(stream: Stream, norm: Norm, weight: Tensor, bias: Tensor) -> Tensor:
    x, scaled, squares = stream
    assert scaled is not None  # noqa: S101 - of a stream of ours
    if squares is None:
        return F.linear(scaled.float(), weight, bias)
    read = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)
    block = 8
    _read_kernel[(len(squares), triton.cdiv(len(weight), block))](
        x,
        squares,
        x if norm.factor is None else norm.factor,
        x if norm.shift is None else norm.shift,
        weight,
        bias,
        read,
        x.shape[-1],
        len(weight),
        _row_stride(norm.factor, norm.shift),
        EPSILON=NORM_EPSILON,
        SQUARES=squares.shape[1],
        BLOCK_SQUARES=triton.next_power_of_2(squares.shape[1]),
        FACTOR=norm.factor is not None,
        SHIFT=norm.shift is not None,
        BLOCK_OUT=block,
        BLOCK_WIDTH=triton.next_power_of_2(x.shape[-1]),
        **_overlap(x),
    )
    return read


def fused_norm_qkv(stream: Stream, norm: Norm, weight: Tensor, span: Span, cache: Tensor, **tiles: int) -> Tensor:
    x, scaled, squares = stream
    assert scaled is not None  # noqa: S101 - of a stream of ours
    if squares is None:
        return fused_rotate_into_cache(F.linear(scaled, weight), span.rope, span.positions, cache)
    batch, tokens, width = x.shape
    _, _, capacity, kv_heads, head_dim = cache.shape
    num_heads = len(weight) // head_dim - 2 * kv_heads
    q = x.new_empty(batch, tokens, num_heads, head_dim)
    positions, (cos, sin) = span.positions.contiguous(), (table.contiguous() for table in span.rope)
    tile = _tiles(x, "norm_qkv") | tiles
    tile["BLOCK_OUT"] = min(tile["BLOCK_OUT"], triton.next_power_of_2(head_dim // 2))
    parts = triton.cdiv(head_dim // 2, tile["BLOCK_OUT"])
    _norm_qkv_kernel[(triton.cdiv(batch * tokens, tile["BLOCK_ROWS"]), (num_heads + 2 * kv_heads) * parts)](
        _source(scaled.view(-1, width), tile, "BLOCK_ROWS"),
        squares,
        x if norm.product is None else norm.product,
        weight,
        _source(weight, tile, "BLOCK_OUT"),
        cos,
        sin,
        positions,
        q,
        cache,
        batch * tokens,
        tokens,
        width,
        capacity,
        tokens if len(cos) > 1 else 0,
        tokens if len(positions) > 1 else 0,
        batch * capacity * kv_heads * head_dim,
        _row_stride(norm.product),
        EPSILON=NORM_EPSILON,
        SQUARES=squares.shape[1],
        BLOCK_SQUARES=triton.next_power_of_2(squares.shape[1]),
        PRODUCT=norm.product is not None,
        PER_TOKEN=_row_stride(norm.product) > 0,
        NUM_HEADS=num_heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        PARTS=parts,
        **tile,
    )
    return q


def fused_norm_geglu(stream: Stream, norm: Norm, weight: Tensor, **tiles: int) -> Tensor:
    x, scaled, squares = stream
    assert scaled is not None  # noqa: S101 - of a stream of ours
    if squares is None:
        return fused_geglu(F.linear(scaled, weight))
    width, inner, rows = x.shape[-1], len(weight) // 2, len(squares)
    out = x.new_empty(*x.shape[:-1], inner)
    tile = _tiles(x, "norm_geglu") | tiles
    _norm_geglu_kernel[(triton.cdiv(rows, tile["BLOCK_ROWS"]), triton.cdiv(inner, tile["BLOCK_OUT"]))](
        _source(scaled.view(-1, width), tile, "BLOCK_ROWS"),
        squares,
        x if norm.product is None else norm.product,
        weight,
        _source(weight, tile, "BLOCK_OUT"),
        out,
        rows,
        width,
        inner,
        _row_stride(norm.product),
        EPSILON=NORM_EPSILON,
        SQUARES=squares.shape[1],
        BLOCK_SQUARES=triton.next_power_of_2(squares.shape[1]),
        PRODUCT=norm.product is not None,
        PER_TOKEN=_row_stride(norm.product) > 0,
        **tile,
    )
    return out


def fused_project_add(
    y: Tensor,
    weight: Tensor,
    stream: Stream,
    gate: Tensor | None,
    norm: Norm,
    **tiles: int,
) -> Stream:
    x, y, factor = stream.x, y.contiguous(), norm.factor
    width, inner, rows = x.shape[-1], y.shape[-1], x.numel() // x.shape[-1]
    if _is_for_cublas(x, rows):
        return Stream(*fused_add_rms_norm(x, F.linear(y, weight), gate, factor, norm.shift))
    tile = _tiles(x, "out" if inner <= 2 * width else "down") | tiles
    splits, parts = tile.pop("SPLITS", 1), triton.cdiv(width, tile["BLOCK_OUT"])
    blocks = triton.cdiv(rows, tile["BLOCK_ROWS"])
    out, scaled, squares = torch.empty_like(x), torch.empty_like(x), x.new_empty(rows, parts, dtype=torch.float32)
    partial, counters = squares, squares
    if splits > 1:
        partial, counters = x.new_empty(splits, rows, width, dtype=torch.float32), _counters(x.device, blocks * parts)
    _project_add_kernel[(blocks, parts, splits)](
        _source(y.view(rows, inner), tile, "BLOCK_ROWS"),
        weight,
        _source(weight, tile, "BLOCK_OUT"),
        x,
        x if gate is None else gate,
        x if factor is None else factor,
        out,
        scaled,
        squares,
        partial,
        counters,
        rows,
        width,
        inner,
        triton.cdiv(triton.cdiv(inner, tile["BLOCK_WIDTH"]), splits) * tile["BLOCK_WIDTH"],
        _row_stride(gate, factor),
        GATE=gate is not None,
        FACTOR=factor is not None,
        PER_TOKEN=_row_stride(gate, factor) > 0,
        SPLITS=splits,
        **tile,
    )
    return Stream(out, scaled, squares)


def _is_for_cublas(x: Tensor, rows: int) -> bool:
    """Whether its products and a kernel behind them are faster than one kernel of ours for both."""
    return rows > MANY_ROWS or (x.dtype == torch.float32 and x.device.type == "cuda")


def _tiles(x: Tensor, kernel: str) -> dict[str, int]:
    """How a product is shared out to programs: rows, outputs, and how much of a row at a time."""
    overlap = _overlap(x)
    if x.dtype == torch.float32:  # multiplied outside of the tensor cores, in registers
        tiles = {"BLOCK_OUT": 16, "BLOCK_WIDTH": 32, "num_stages": 2}
    elif overlap["OVERLAP"]:
        tiles = HOPPER_TILES[kernel]
    else:  # factors pass through registers
        tiles = {"BLOCK_OUT": 16, "BLOCK_WIDTH": 128, "num_stages": 3}
    is_gpu = x.device.type != "cpu"
    block_rows = 16 if x.dtype == torch.float32 else 64
    on_gpu = {"PREFETCH": is_gpu, "TMA": is_gpu and _is_for_hopper(x)}
    return {"BLOCK_ROWS": block_rows, "num_warps": 4, **tiles, **on_gpu, **overlap}


def _source(matrix: Tensor, tile: dict[str, int], rows: str) -> Any:
    """A matrix as a kernel takes it: where the hardware fetches whole blocks, as the description of one."""
    if not tile["TMA"]:
        return matrix
    return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [tile[rows], tile["BLOCK_WIDTH"]])


def _overlap(x: Tensor) -> dict[str, bool]:
    """Whether a kernel begins while the one before it ends, and how its launch is told."""
    if x.device.type == "cpu":
        return {"OVERLAP": False}
    target = triton.runtime.driver.active.get_current_target()
    overlaps = target.backend == "cuda" and target.arch >= OVERLAP_CAPABILITY
    return {"OVERLAP": overlaps} | ({"launch_pdl": True} if overlaps else {})


def _row_stride(*vectors: Tensor | None) -> int:
    """How far those of one token are from those of the next, alike for all; 0: one vector serves all tokens."""
    (stride,) = {vector.stride(-2) if vector.dim() > 1 else 0 for vector in vectors if vector is not None} or {0}
    return stride


@functools.cache
def _counters(device: torch.device, count: int) -> Tensor:
    """Zeros, one for each block of outputs that several programs make; the last of them sets it back."""
    return torch.zeros(count, dtype=torch.int32, device=device)


def fused_quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows, width = x.shape
    quantised = torch.empty_like(x, dtype=FP8)
    scale = x.new_empty(rows, 1, dtype=torch.float32)
    _quantise_kernel[(rows,)](
        x, quantised, scale, width, LARGEST=FP8_MAX, BLOCK=triton.next_power_of_2(width), num_warps=8
    )
    return quantised, scale


FUSED = Ops(
    "fused",
    fused_rms_norm,
    fused_add_rms_norm,
    fused_add_layer_norm,
    addmm_gelu,
    fused_rotate_into_cache,
    fused_geglu,
    hopper_attend_prefix,
    fused_attend_suffix,
    fused_quantise_rows,
    fused_stream,
    fused_embed,
    fused_read,
    fused_norm_qkv,
    fused_norm_geglu,
    fused_project_add,
)

CACHE_LINE = 64 if triton is None else tl.constexpr(64)
"""Elements of two bytes in 128 bytes."""

jit: Callable[[Callable[..., Any]], Any] = (lambda function: function) if triton is None else triton.jit


@jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    gate_ptr,
    factor_ptr,
    shift_ptr,
    total_ptr,
    normed_ptr,
    width,
    stride,
    EPSILON: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    FACTOR: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.program_id(0).to(tl.int64)
    at, of_row = row * width + columns, row * stride + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            y *= tl.load(gate_ptr + of_row, mask=inside, other=0.0)
        total = (x + y).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
        x = total.to(tl.float32)  # the norm is that of the rounded sum
    x *= tl.rsqrt(tl.sum(x * x) / width + EPSILON)
    if FACTOR:
        x *= tl.load(factor_ptr + of_row, mask=inside, other=0.0)
    if SHIFT:
        x += tl.load(shift_ptr + of_row, mask=inside, other=0.0)
    tl.store(normed_ptr + at, x.to(normed_ptr.dtype.element_ty), mask=inside)


@jit
def _layer_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    factor_ptr,
    shift_ptr,
    total_ptr,
    normed_ptr,
    width,
    EPSILON: tl.constexpr,
    FACTOR: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = (x + y).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, total, mask=inside)
    x = total.to(tl.float32)  # the norm is that of the rounded sum
    x = tl.where(inside, x - tl.sum(x) / width, 0.0)
    x *= tl.rsqrt(tl.sum(x * x) / width + EPSILON)
    if FACTOR:
        x *= tl.load(factor_ptr + columns, mask=inside, other=0.0)
    if SHIFT:
        x += tl.load(shift_ptr + columns, mask=inside, other=0.0)
    tl.store(normed_ptr + at, x.to(normed_ptr.dtype.element_ty), mask=inside)


@jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_ptr,
    cache_ptr,
    tokens,
    capacity,
    rope_batch_stride,
    position_batch_stride,
    values_offset,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_EACH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: some heads of one token."""
    HEADS: tl.constexpr = NUM_HEADS + 2 * KV_HEADS
    token = tl.program_id(0)
    row, column = token // tokens, token % tokens
    h, i = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK)
    is_dim = i < HALF
    at = (row * rope_batch_stride + column) * HALF + i
    cos = tl.load(cos_ptr + at, mask=is_dim, other=0.0)[None, :]
    sin = tl.load(sin_ptr + at, mask=is_dim, other=0.0)[None, :]
    position = tl.load(positions_ptr + row * position_batch_stride + column)

    head = tl.program_id(1) * HEADS_EACH + h
    inside = ((h < HEADS_EACH) & (head < HEADS))[:, None] & is_dim[None, :]
    source = qkv_ptr + token.to(tl.int64) * (HEADS * 2 * HALF) + head[:, None] * (2 * HALF) + i[None, :]
    first, second = tl.load(source, mask=inside, other=0.0), tl.load(source + HALF, mask=inside, other=0.0)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    rotates = (head < NUM_HEADS + KV_HEADS)[:, None]
    first = tl.where(rotates, (wide_first * cos - wide_second * sin).to(first.dtype), first)
    second = tl.where(rotates, (wide_second * cos + wide_first * sin).to(second.dtype), second)

    is_query = (head < NUM_HEADS)[:, None]
    target = q_ptr + token.to(tl.int64) * (NUM_HEADS * 2 * HALF) + head[:, None] * (2 * HALF) + i[None, :]
    tl.store(target, first, mask=inside & is_query)
    tl.store(target + HALF, second, mask=inside & is_query)
    kv_head = (head - NUM_HEADS) % KV_HEADS
    offset = tl.where(head < NUM_HEADS + KV_HEADS, 0, values_offset) + kv_head * (2 * HALF)
    entry = cache_ptr + (row.to(tl.int64) * capacity + position) * (KV_HEADS * 2 * HALF)
    target = entry + offset[:, None] + i[None, :]
    tl.store(target, first, mask=inside & ~is_query)
    tl.store(target + HALF, second, mask=inside & ~is_query)


@jit
def _geglu_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: a block of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    source = gate_up_ptr + row * 2 * width + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0)
    product = _gelu(gate).to(up.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * width + columns, product.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    keys_values,
    lengths_ptr,
    shares_ptr,
    weights_ptr,
    rows,
    capacity,
    batch,
    values_offset,
    share,
    scale,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: a block of the rows (token, head of the group) of one key head, against one share of the keys.

    Writes the sum of values weighted by 2^(logit - most), logits being to base 2 and `most` the largest of them, `most`
    itself, and the sum of the weights.
    """
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b, kv = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    split = tl.program_id(2)
    d = tl.arange(0, BLOCK_DIM)
    is_row, is_dim = r < rows, d < HEAD_DIM

    _wait(OVERLAP)
    token_head = (b * (rows // GROUP) + r // GROUP) * NUM_HEADS + kv * GROUP + r % GROUP
    q = tl.load(
        q_ptr + token_head[:, None].to(tl.int64) * HEAD_DIM + d[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    if not TMA:
        keys_values += (b.to(tl.int64) * capacity * KV_HEADS + kv) * HEAD_DIM
    start = split * share
    end = tl.minimum(start + share, tl.load(lengths_ptr + b))
    most = tl.full([BLOCK_ROWS], -1e30, tl.float32)  # finite, so that a share without keys has weight 0 and no NaN
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    found = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for first in range(start, end, BLOCK_KEYS):
        k = first + tl.arange(0, BLOCK_KEYS)
        is_key = k < end
        at = k[:, None] * (KV_HEADS * HEAD_DIM) + d[None, :]
        inside = is_key[:, None] & is_dim[None, :]
        if TMA:
            keys = keys_values.load([b * capacity + first, kv * HEAD_DIM])
        else:
            keys = tl.load(keys_values + at, mask=inside, other=0.0)
        logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where(is_key[None, :], logits, -1e30)
        highest = tl.maximum(most, tl.max(logits, 1))
        weights = tl.where(is_key[None, :], tl.exp2(logits - highest[:, None]), 0.0)
        shrink = tl.exp2(most - highest)
        if TMA:
            values = keys_values.load([(batch + b) * capacity + first, kv * HEAD_DIM])
        else:
            values = tl.load(keys_values + values_offset + at, mask=inside, other=0.0)
        found = found * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        most = highest

    out_row = (split * batch * KV_HEADS + tl.program_id(1)) * rows + r
    tl.store(
        shares_ptr + out_row[:, None].to(tl.int64) * HEAD_DIM + d[None, :],
        found,
        mask=is_row[:, None] & is_dim[None, :],
    )
    tl.store(weights_ptr + out_row, most, mask=is_row)
    tl.store(weights_ptr + tl.num_programs(2) * batch * KV_HEADS * rows + out_row, total, mask=is_row)


@jit
def _tiled_attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    keys_values,
    lengths_ptr,
    out_ptr,
    rows,
    batch,
    capacity,
    scale,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program: a block of the rows (token, head of the group) of one key head, against all of its keys.

    `keys_values` is a descriptor: a block is fetched by its first element, past the valid keys and the head too, so
    that no thread holds addresses. A key that is not valid has weight 0. `scale` turns products into logits of powers
    of two.
    """
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b, kv = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    d = tl.arange(0, BLOCK_DIM)
    is_dim = d < HEAD_DIM
    is_element = (r < rows)[:, None] & is_dim[None, :]

    # 64 bits for one number of the program, not for one of each thread, whose registers are full of sums.
    first_token = b.to(tl.int64) * (rows // GROUP) * (NUM_HEADS * HEAD_DIM)
    at = ((r // GROUP * NUM_HEADS + kv * GROUP + r % GROUP) * HEAD_DIM)[:, None] + d[None, :]
    q = tl.load(q_ptr + first_token + at, mask=is_element, other=0.0)
    length = tl.load(lengths_ptr + b)
    most = tl.full([BLOCK_ROWS], -1e30, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    found = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for first in range(0, length, BLOCK_KEYS):
        keys = keys_values.load([b * capacity + first, kv * HEAD_DIM])
        logits = tl.dot(q, tl.trans(keys), input_precision="ieee")
        logits = tl.where((first + tl.arange(0, BLOCK_KEYS) < length)[None, :], logits, -1e30)
        highest = tl.maximum(most, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - highest[:, None])
        shrink = tl.exp2(most - highest)
        total = total * shrink + tl.sum(weights, 1)
        values = keys_values.load([(batch + b) * capacity + first, kv * HEAD_DIM])
        found = tl.dot(weights.to(values.dtype), values, found * shrink[:, None], input_precision="ieee")
        most = highest
    attended = (found / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first_token + at, attended, mask=is_element)


@jit
def _join_kernel(  # type: ignore[no-untyped-def]
    shares_ptr,
    weights_ptr,
    out_ptr,
    rows,
    batch,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: what the shares of the keys gave one row, as one attention."""
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    row = tl.program_id(0)
    r, group = row % rows, row // rows
    b, kv = group // KV_HEADS, group % KV_HEADS
    s, d = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DIM)
    is_split, is_dim = s < SPLITS, d < HEAD_DIM
    per_split = batch * KV_HEADS * rows
    _wait(OVERLAP)
    most = tl.load(weights_ptr + s * per_split + row, mask=is_split, other=-1e30)
    totals = tl.load(weights_ptr + (SPLITS + s) * per_split + row, mask=is_split, other=0.0)
    shrink = tl.exp2(most - tl.max(most, 0))
    found = tl.load(
        shares_ptr + (s[:, None] * per_split + row).to(tl.int64) * HEAD_DIM + d[None, :],
        mask=is_split[:, None] & is_dim[None, :],
        other=0.0,
    )
    attended = tl.sum(found * shrink[:, None], 0) / tl.sum(totals * shrink, 0)
    token_head = (b * (rows // GROUP) + r // GROUP) * NUM_HEADS + kv * GROUP + r % GROUP
    tl.store(out_ptr + token_head.to(tl.int64) * HEAD_DIM + d, attended.to(out_ptr.dtype.element_ty), mask=is_dim)


@jit
def _quantise_kernel(x_ptr, quantised_ptr, scale_ptr, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / LARGEST
    tl.store(scale_ptr + row, scale)
    tl.store(quantised_ptr + row * width + columns, (x / scale).to(quantised_ptr.dtype.element_ty), mask=inside)


@jit
def _norm_qkv_kernel(  # type: ignore[no-untyped-def]
    scaled,
    squares_ptr,
    product_ptr,
    weight_ptr,
    weights,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_ptr,
    cache_ptr,
    rows,
    tokens,
    width,
    capacity,
    rope_batch_stride,
    position_batch_stride,
    values_offset,
    stride,
    EPSILON: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_SQUARES: tl.constexpr,
    PRODUCT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PREFETCH: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: for a block of tokens, some elements of the first half of a head and those that turn with them."""
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    i = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row, inside = r < rows, i < HALF
    out, num_out = head * (2 * HALF) + i, (NUM_HEADS + 2 * KV_HEADS) * (2 * HALF)
    if PREFETCH:
        _prefetch_rows(weight_ptr, out, inside, 0, width, width)
        _prefetch_rows(weight_ptr + HALF * width, out, inside, 0, width, width)
    # Whatever else is needed is asked for before the product, which takes longer than the answers.
    row, column = r // tokens, r % tokens
    within = is_row[:, None] & inside[None, :]
    at = (row * rope_batch_stride + column)[:, None] * HALF + i[None, :]
    cos = tl.load(cos_ptr + at, mask=within, other=0.0)
    sin = tl.load(sin_ptr + at, mask=within, other=0.0)
    position = tl.load(positions_ptr + row * position_batch_stride + column, mask=is_row, other=0)
    if PRODUCT:
        first_product = _rows_of(product_ptr, r, out, is_row, inside, stride, PER_TOKEN)
        second_product = _rows_of(product_ptr, r, out + HALF, is_row, inside, stride, PER_TOKEN)
    _wait(OVERLAP)
    scale = _row_scale(squares_ptr, r, is_row, width, EPSILON, SQUARES, BLOCK_SQUARES)[:, None]
    first = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    second = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    first_row, first_first = tl.program_id(0) * BLOCK_ROWS, head * (2 * HALF) + part * BLOCK_OUT
    for start in range(0, width, BLOCK_WIDTH):
        x = _tile(scaled, first_row, start, rows, width, BLOCK_ROWS, BLOCK_WIDTH, TMA)
        weight = _tile(weights, first_first, start, num_out, width, BLOCK_OUT, BLOCK_WIDTH, TMA)
        first = tl.dot(x, tl.trans(weight), first, input_precision="ieee")
        weight = _tile(weights, first_first + HALF, start, num_out, width, BLOCK_OUT, BLOCK_WIDTH, TMA)
        second = tl.dot(x, tl.trans(weight), second, input_precision="ieee")
    first *= scale
    second *= scale
    if PRODUCT:
        first += first_product
        second += second_product
    if head < NUM_HEADS + KV_HEADS:
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    if head < NUM_HEADS:
        target = q_ptr + (r.to(tl.int64) * NUM_HEADS + head)[:, None] * (2 * HALF) + i[None, :]
    else:
        kv_head = (head - NUM_HEADS) % KV_HEADS
        place = (row.to(tl.int64) * capacity + position) * KV_HEADS + kv_head
        target = cache_ptr + place[:, None] * (2 * HALF) + i[None, :]
        if head >= NUM_HEADS + KV_HEADS:
            target += values_offset
    tl.store(target, first.to(q_ptr.dtype.element_ty), mask=within)
    tl.store(target + HALF, second.to(q_ptr.dtype.element_ty), mask=within)


@jit
def _norm_geglu_kernel(  # type: ignore[no-untyped-def]
    scaled,
    squares_ptr,
    product_ptr,
    weight_ptr,
    weights,
    out_ptr,
    rows,
    width,
    inner,
    stride,
    EPSILON: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_SQUARES: tl.constexpr,
    PRODUCT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PREFETCH: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: a block of tokens and of the elements of their gates, and of what these multiply."""
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row, inside = r < rows, n < inner
    if PREFETCH:
        _prefetch_rows(weight_ptr, n, inside, 0, width, width)
        _prefetch_rows(weight_ptr + inner * width, n, inside, 0, width, width)
    if PRODUCT:
        gate_product = _rows_of(product_ptr, r, n, is_row, inside, stride, PER_TOKEN)
        up_product = _rows_of(product_ptr, r, n + inner, is_row, inside, stride, PER_TOKEN)
    _wait(OVERLAP)
    scale = _row_scale(squares_ptr, r, is_row, width, EPSILON, SQUARES, BLOCK_SQUARES)[:, None]
    gate = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    up = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    first_row, first_gate = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_OUT
    for start in range(0, width, BLOCK_WIDTH):
        x = _tile(scaled, first_row, start, rows, width, BLOCK_ROWS, BLOCK_WIDTH, TMA)
        weight = _tile(weights, first_gate, start, 2 * inner, width, BLOCK_OUT, BLOCK_WIDTH, TMA)
        gate = tl.dot(x, tl.trans(weight), gate, input_precision="ieee")
        weight = _tile(weights, inner + first_gate, start, 2 * inner, width, BLOCK_OUT, BLOCK_WIDTH, TMA)
        up = tl.dot(x, tl.trans(weight), up, input_precision="ieee")
    gate *= scale
    up *= scale
    if PRODUCT:
        gate += gate_product
        up += up_product
    out = _gelu(gate) * up
    at = r[:, None].to(tl.int64) * inner + n[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & inside[None, :])


@jit
def _project_add_kernel(  # type: ignore[no-untyped-def]
    y,
    weight_ptr,
    weights,
    x_ptr,
    gate_ptr,
    factor_ptr,
    out_ptr,
    scaled_ptr,
    squares_ptr,
    partial_ptr,
    counters_ptr,
    rows,
    width,
    inner,
    share,
    stride,
    GATE: tl.constexpr,
    FACTOR: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PREFETCH: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: a block of tokens and outputs, and one share of what is summed up for each.

    Whoever ends last adds up the shares, in their order whatever the order in which they came.
    """
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    split = tl.program_id(2)
    is_row, inside = r < rows, n < width
    first = split * share
    end = tl.minimum(first + share, inner)
    if PREFETCH:
        _prefetch_rows(weight_ptr, n, inside, first, end, inner)
    at = r[:, None].to(tl.int64) * width + n[None, :]
    within = is_row[:, None] & inside[None, :]
    if GATE:
        gate = _rows_of(gate_ptr, r, n, is_row, inside, stride, PER_TOKEN)
    if FACTOR:
        factor = _rows_of(factor_ptr, r, n, is_row, inside, stride, PER_TOKEN)
    _wait(OVERLAP)
    x = tl.load(x_ptr + at, mask=within, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    for start in range(first, end, BLOCK_WIDTH):
        one = _tile(y, tl.program_id(0) * BLOCK_ROWS, start, rows, inner, BLOCK_ROWS, BLOCK_WIDTH, TMA)
        weight = _tile(weights, tl.program_id(1) * BLOCK_OUT, start, width, inner, BLOCK_OUT, BLOCK_WIDTH, TMA)
        total = tl.dot(one, tl.trans(weight), total, input_precision="ieee")
    is_last = True
    if SPLITS > 1:
        size = tl.full([], rows, tl.int64) * width
        tl.store(partial_ptr + split * size + at, total, mask=within)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        counter = counters_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        is_last = tl.atomic_add(counter, 1) == SPLITS - 1
        if is_last:
            tl.store(counter, 0)
            total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(partial_ptr + other * size + at, mask=within, other=0.0, cache_modifier=".cg")
    if is_last:
        if GATE:
            total *= gate
        out = (x + total).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=within)
        total = out.to(tl.float32)
        tl.store(squares_ptr + r * tl.num_programs(1) + tl.program_id(1), tl.sum(total * total, 1), mask=is_row)
        if FACTOR:
            total *= factor
        tl.store(scaled_ptr + at, total.to(out_ptr.dtype.element_ty), mask=within)


@jit
def _stream_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    factor_ptr,
    scaled_ptr,
    squares_ptr,
    width,
    stride,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    _wait(OVERLAP)
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    tl.store(squares_ptr + row, tl.sum(wide * wide))
    if FACTOR:
        x = (wide * tl.load(factor_ptr + row * stride + columns, mask=inside, other=0.0)).to(x.dtype)
    tl.store(scaled_ptr + row * width + columns, x, mask=inside)


@jit
def _rows_of(ptr, r, n, is_row, inside, stride, PER_TOKEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements `n` of a vector, as one row; of rows `r` of a matrix, where every token has a vector of its own."""
    if PER_TOKEN:
        at = r[:, None].to(tl.int64) * stride + n[None, :]
        rows = tl.load(ptr + at, mask=is_row[:, None] & inside[None, :], other=0.0)
    else:
        rows = tl.load(ptr + n, mask=inside, other=0.0)[None, :]
    return rows


@jit
def _row_scale(  # type: ignore[no-untyped-def]
    squares_ptr, r, is_row, width, EPSILON: tl.constexpr, SQUARES: tl.constexpr, BLOCK_SQUARES: tl.constexpr
):
    """What the norm multiplies rows `r` by."""
    part = tl.arange(0, BLOCK_SQUARES)
    squares = tl.load(
        squares_ptr + r[:, None] * SQUARES + part[None, :],
        mask=is_row[:, None] & (part < SQUARES)[None, :],
        other=0.0,
    )
    return tl.rsqrt(tl.sum(squares, 1) / width + EPSILON)


@jit
def _wait(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """For the kernels before this one to end. The next one may then begin, to wait likewise."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@jit
def _tile(  # type: ignore[no-untyped-def]
    source, first, start, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TMA: tl.constexpr
):
    """Elements from `start` on of rows from `first` on of a matrix; zeros beyond its `rows` and `width`."""
    if TMA:
        tile = source.load([first, start])
    else:
        r, k = first + tl.arange(0, BLOCK_ROWS), start + tl.arange(0, BLOCK_WIDTH)
        at = r[:, None].to(tl.int64) * width + k[None, :]
        tile = tl.load(source + at, mask=(r < rows)[:, None] & (k < width)[None, :], other=0.0)
    return tile


@jit
def _embed_kernel(  # type: ignore[no-untyped-def]
    actions_ptr,
    weight_ptr,
    bias_ptr,
    factor_ptr,
    x_ptr,
    scaled_ptr,
    squares_ptr,
    width,
    num_actions,
    stride,
    FACTOR: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: a block of the elements of one token."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, k = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_WIDTH)
    inside, is_action = n < width, k < num_actions
    at = n[:, None] * num_actions + k[None, :]
    weight = tl.load(weight_ptr + at, mask=inside[:, None] & is_action[None, :], other=0.0)
    bias = tl.load(bias_ptr + n, mask=inside, other=0.0)
    _wait(OVERLAP)
    actions = tl.load(actions_ptr + row * num_actions + k, mask=is_action, other=0.0)
    x = (tl.sum(weight * actions[None, :], 1) + bias).to(x_ptr.dtype.element_ty)
    wide = x.to(tl.float32)
    tl.store(squares_ptr + row * tl.num_programs(1) + part, tl.sum(tl.where(inside, wide * wide, 0.0)))
    tl.store(x_ptr + row * width + n, x, mask=inside)
    if FACTOR:
        x = (wide * tl.load(factor_ptr + row * stride + n, mask=inside, other=0.0)).to(x.dtype)
    tl.store(scaled_ptr + row * width + n, x, mask=inside)


@jit
def _read_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    squares_ptr,
    factor_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    read_ptr,
    width,
    num_actions,
    stride,
    EPSILON: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_SQUARES: tl.constexpr,
    FACTOR: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: a block of the actions of one token."""
    row = tl.program_id(0).to(tl.int64)
    n, k = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_WIDTH)
    is_action, inside = n < num_actions, k < width
    at = n[:, None] * width + k[None, :]
    weight = tl.load(weight_ptr + at, mask=is_action[:, None] & inside[None, :], other=0.0)
    bias = tl.load(bias_ptr + n, mask=is_action, other=0.0)
    _wait(OVERLAP)
    part = tl.arange(0, BLOCK_SQUARES)
    squares = tl.load(squares_ptr + row * SQUARES + part, mask=part < SQUARES, other=0.0)
    x = tl.load(x_ptr + row * width + k, mask=inside, other=0.0)
    normed = x.to(tl.float32) * tl.rsqrt(tl.sum(squares) / width + EPSILON)
    if FACTOR:
        normed *= tl.load(factor_ptr + row * stride + k, mask=inside, other=0.0)
    if SHIFT:
        normed += tl.load(shift_ptr + row * stride + k, mask=inside, other=0.0)
    normed = normed.to(x.dtype).to(tl.float32)
    read = tl.sum(weight * normed[None, :], 1) + bias
    tl.store(read_ptr + row * num_actions + n, read, mask=is_action)


@jit
def _prefetch_rows(weight_ptr, n, inside, start, end, width):  # type: ignore[no-untyped-def]
    """Has the cache fetch elements `start` to `end` of rows `n` of a matrix, which no kernel before this one writes."""
    n = tl.where(inside, n, 0)
    for first in range(start, end, 8 * CACHE_LINE):
        k = tl.minimum(first + tl.arange(0, 8) * CACHE_LINE, end - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [weight_ptr + n[:, None] * width + k[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def _gelu(x):  # type: ignore[no-untyped-def]
    """In its tanh form; tanh(z) = 2·sigmoid(2z) - 1, so that 0.5·(1 + tanh(z)) = sigmoid(2z)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
