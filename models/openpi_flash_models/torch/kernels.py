"""What lies between the model's matrix products as Triton kernels, one launch each.

A flow step is short: on a GPU its time is that of its launches and of what they read and write between the products.
Kernels need a GPU, Triton, and a C compiler for its launcher. None can be differentiated. Shapes are those of ops.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openpi_flash_models.torch.launch import gelu, jit, row_stride, tl, triton
from openpi_flash_models.torch.ops import FP8, FP8_MAX, NORM_EPSILON, Rope


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
        row_stride(gate, factor, shift),
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


def fused_quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows, width = x.shape
    quantised = torch.empty_like(x, dtype=FP8)
    scale = x.new_empty(rows, 1, dtype=torch.float32)
    _quantise_kernel[(rows,)](
        x, quantised, scale, width, LARGEST=FP8_MAX, BLOCK=triton.next_power_of_2(width), num_warps=8
    )
    return quantised, scale


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
    product = gelu(gate).to(up.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * width + columns, product.to(out_ptr.dtype.element_ty), mask=inside)


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
