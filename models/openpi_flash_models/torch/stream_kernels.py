"""Ways into an expert's stream of tokens and out of it as Triton kernels. Shapes are those of ops.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from openpi_flash_models.torch.expert_kernels import is_for_cublas
from openpi_flash_models.torch.kernels import fused_rms_norm
from openpi_flash_models.torch.launch import jit, overlap, row_stride, tl, triton, wait
from openpi_flash_models.torch.ops import NORM_EPSILON, Norm, Stream


def fused_stream(x: Tensor, norm: Norm) -> Stream:
    x, factor = x.contiguous(), norm.factor
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    if is_for_cublas(rows, x.dtype, x.device):
        return Stream(x, fused_rms_norm(x, factor, norm.shift))
    scaled, squares = torch.empty_like(x), x.new_empty(rows, 1, dtype=torch.float32)
    _stream_kernel[(rows,)](
        x,
        x if factor is None else factor,
        scaled,
        squares,
        width,
        row_stride(factor),
        FACTOR=factor is not None,
        BLOCK=triton.next_power_of_2(width),
        **overlap(x),
    )
    return Stream(x, scaled, squares)


def fused_embed(actions: Tensor, weight: Tensor, bias: Tensor, norm: Norm, dtype: torch.dtype) -> Stream:
    rows, width = actions.numel() // actions.shape[-1], len(weight)
    if is_for_cublas(rows, dtype, actions.device):
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
        row_stride(norm.factor),
        FACTOR=norm.factor is not None,
        BLOCK_OUT=block,
        BLOCK_WIDTH=triton.next_power_of_2(actions.shape[-1]),
        **overlap(x),
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
        row_stride(norm.factor, norm.shift),
        EPSILON=NORM_EPSILON,
        SQUARES=squares.shape[1],
        BLOCK_SQUARES=triton.next_power_of_2(squares.shape[1]),
        FACTOR=norm.factor is not None,
        SHIFT=norm.shift is not None,
        BLOCK_OUT=block,
        BLOCK_WIDTH=triton.next_power_of_2(x.shape[-1]),
        **overlap(x),
    )
    return read


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
    wait(OVERLAP)
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    tl.store(squares_ptr + row, tl.sum(wide * wide))
    if FACTOR:
        x = (wide * tl.load(factor_ptr + row * stride + columns, mask=inside, other=0.0)).to(x.dtype)
    tl.store(scaled_ptr + row * width + columns, x, mask=inside)


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
    wait(OVERLAP)
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
    wait(OVERLAP)
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
