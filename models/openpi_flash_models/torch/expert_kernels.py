"""An expert's layer as Triton kernels: each a product with what surrounds it. Shapes are those of ops.py.

For many tokens cuBLAS is faster, with a kernel of kernels.py behind it, and serves.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from openpi_flash_models.torch.kernels import (
    fused_add_rms_norm,
    fused_geglu,
    fused_rotate_into_cache,
)
from openpi_flash_models.torch.launch import gelu, is_for_hopper, jit, overlap, row_stride, tl, triton, wait
from openpi_flash_models.torch.ops import NORM_EPSILON, Norm, Span, Stream

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

MANY_ROWS = 64
"""Tokens of a batch up to which one kernel of ours for a product and what surrounds it is faster than cuBLAS."""


HOPPER_TILES = {
    "norm_qkv": {"BLOCK_OUT": 32, "BLOCK_WIDTH": 128, "num_stages": 4},
    "out": {"BLOCK_OUT": 16, "BLOCK_WIDTH": 256, "num_stages": 4, "SPLITS": 1},
    "norm_geglu": {"BLOCK_OUT": 32, "BLOCK_WIDTH": 128, "num_stages": 4},
    "down": {"BLOCK_OUT": 32, "BLOCK_WIDTH": 256, "num_stages": 3, "SPLITS": 4},
}
"""How these are shared out to programs on Hopper: the fastest that benchmarks/kernels.py found."""


CACHE_LINE = 64 if triton is None else tl.constexpr(64)
"""Elements of two bytes in 128 bytes."""


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
        row_stride(norm.product),
        EPSILON=NORM_EPSILON,
        SQUARES=squares.shape[1],
        BLOCK_SQUARES=triton.next_power_of_2(squares.shape[1]),
        PRODUCT=norm.product is not None,
        PER_TOKEN=row_stride(norm.product) > 0,
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
        row_stride(norm.product),
        EPSILON=NORM_EPSILON,
        SQUARES=squares.shape[1],
        BLOCK_SQUARES=triton.next_power_of_2(squares.shape[1]),
        PRODUCT=norm.product is not None,
        PER_TOKEN=row_stride(norm.product) > 0,
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
    if is_for_cublas(rows, x.dtype, x.device):
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
        row_stride(gate, factor),
        GATE=gate is not None,
        FACTOR=factor is not None,
        PER_TOKEN=row_stride(gate, factor) > 0,
        SPLITS=splits,
        **tile,
    )
    return Stream(out, scaled, squares)


def is_for_cublas(rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether its products and a kernel behind them are faster than one kernel of ours for both."""
    return rows > MANY_ROWS or (dtype == torch.float32 and device.type == "cuda")


def _tiles(x: Tensor, kernel: str) -> dict[str, int]:
    """How a product is shared out to programs: rows, outputs, and how much of a row at a time."""
    overlapped = overlap(x)
    if x.dtype == torch.float32:  # multiplied outside of the tensor cores, in registers
        tiles = {"BLOCK_OUT": 16, "BLOCK_WIDTH": 32, "num_stages": 2}
    elif overlapped["OVERLAP"]:
        tiles = HOPPER_TILES[kernel]
    else:  # factors pass through registers
        tiles = {"BLOCK_OUT": 16, "BLOCK_WIDTH": 128, "num_stages": 3}
    is_gpu = x.device.type != "cpu"
    block_rows = 16 if x.dtype == torch.float32 else 64
    on_gpu = {"PREFETCH": is_gpu, "TMA": is_gpu and is_for_hopper(x)}
    return {"BLOCK_ROWS": block_rows, "num_warps": 4, **tiles, **on_gpu, **overlapped}


def _source(matrix: Tensor, tile: dict[str, int], rows: str) -> Any:
    """A matrix as a kernel takes it: where the hardware fetches whole blocks, as the description of one."""
    if not tile["TMA"]:
        return matrix
    return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [tile[rows], tile["BLOCK_WIDTH"]])


@functools.cache
def _counters(device: torch.device, count: int) -> Tensor:
    """Zeros, one for each block of outputs that several programs make; the last of them sets it back."""
    return torch.zeros(count, dtype=torch.int32, device=device)


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
    wait(OVERLAP)
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
    wait(OVERLAP)
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
    out = gelu(gate) * up
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
    wait(OVERLAP)
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
