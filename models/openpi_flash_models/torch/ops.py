"""What the model does between its matrix products, and the expert with them, in plain PyTorch, which any device and any
compiler understands.

`REFERENCE` says what each computes. fused.py has the same for a GPU, one Triton kernel where here are a dozen;
selection.py chooses.

Shapes: B batch, T tokens, W width of a row, N query heads, K key/value heads, h head_dim, C capacity of a cache.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

NORM_EPSILON = 1e-6
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest number of FP8."""

Rope = tuple[Tensor, Tensor]
"""Cosine and sine of tokens' rotations, (B or 1, T, h/2) float32."""


class Span(NamedTuple):
    """Where the tokens of one pass lie among what came before.

    Attributes:
        positions: (B or 1, T) int64, the place of each in the cache, and what it is rotated by.
        lengths: (B,) int32: every token sees the first `lengths` entries of its row's cache.
        rope: cosine and sine of the positions.
    """

    positions: Tensor
    lengths: Tensor
    rope: Rope


class Norm(NamedTuple):
    """One norm of the action expert and the gate behind it, all float32. What is None is left out.

    Tokens share them, or have their own: then each is (B, T, …).

    Attributes:
        factor: (W,) on the normed vector.
        shift: (W,) added to it.
        gate: (W,) on the output of the block that the norm is in front of.
        product: (out,) the shift times the matrix behind the norm: what it adds to each of that matrix's outputs.
    """

    factor: Tensor | None = None
    shift: Tensor | None = None
    gate: Tensor | None = None
    product: Tensor | None = None


class Stream(NamedTuple):
    """What runs through an expert from layer to layer, made ready for the norm it meets next.

    Attributes:
        x: (B, T, W).
        scaled: in the dtype of x, what a kernel made of x for the product behind the next norm: with `squares` x times
            the factor of that norm, without it the normed x; None where nobody made it.
        squares: (B·T, parts) float32, sums of squares of x, each of a part of a row.
    """

    x: Tensor
    scaled: Tensor | None = None
    squares: Tensor | None = None


class Ops(NamedTuple):
    """One implementation of every operation. Where a factor, shift or gate is None, it is left out.

    The last six are all of an expert but its attention: short of tokens, it waits for launches and memory, so
    that what surrounds a product is part of it.

    Attributes:
        name: `reference` or `fused`.
        rms_norm: (x (B, T, W), factor (W,), shift (W,)) to x over its root mean square, times factor, plus shift.
        add_rms_norm: (x, y, gate (W,), factor, shift) to x + y·gate, rounded to the dtype of x, and the norm of that.
        add_layer_norm: (x, y, factor, shift) to x + y, rounded to the dtype of x, and that less its mean and over its
            standard deviation, times factor, plus shift.
        linear_gelu: (x (…, in), weight (out, in), bias (out,)) to gelu(x·weightᵀ + bias), (…, out).
        rotate_into_cache: (qkv (B, T, (N+2K)·h), rope, positions (B or 1, T), cache) to the rotated queries
            (B, T, N, h); writes the rotated keys and the values to their positions of the cache (2, B, C, K, h).
        geglu: (B, T, 2W), gate and up, to gelu(gate)·up, (B, T, W).
        attend_prefix: (q (B, T, N, h), cache, lengths (B,) int32) to (B, T, N, h): each row attends to the first
            `lengths` entries of its cache, of which there are at most T.
        attend_suffix: the same, for few queries and however many entries.
        quantise_rows: (rows, W) to FP8 and what each row was divided by, (rows, 1) float32.
        stream: (x (B, T, W), the `Norm` it meets next) to a `Stream`.
        embed: (actions (B, T, A) float32, weight (W, A) and bias of a projection in float32, the `Norm` they meet next,
            dtype) to the `Stream` of their tokens.
        read: (stream, the `Norm` it meets, weight (A, W) and bias of a projection in float32) to (B, T, A) float32.
        norm_qkv: (stream, the `Norm` it meets, weight ((N+2K)·h, W), span, cache): `rotate_into_cache` of the product
            of the normed x.
        norm_geglu: (stream, the `Norm` it meets, weight (2M, W)): `geglu` of the product of the normed x, (B, T, M).
        project_add: (y (B, T, M), weight (W, M), stream, gate, the `Norm` it meets next) to the stream of x +
            product·gate, rounded to the dtype of x.
    """

    name: str
    rms_norm: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
    add_layer_norm: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
    linear_gelu: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotate_into_cache: Callable[[Tensor, Rope, Tensor, Tensor], Tensor]
    geglu: Callable[[Tensor], Tensor]
    attend_prefix: Callable[[Tensor, Tensor, Tensor], Tensor]
    attend_suffix: Callable[[Tensor, Tensor, Tensor], Tensor]
    quantise_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    stream: Callable[[Tensor, Norm], Stream]
    embed: Callable[[Tensor, Tensor, Tensor, Norm, torch.dtype], Stream]
    read: Callable[[Stream, Norm, Tensor, Tensor], Tensor]
    norm_qkv: Callable[[Stream, Norm, Tensor, Span, Tensor], Tensor]
    norm_geglu: Callable[[Stream, Norm, Tensor], Tensor]
    project_add: Callable[[Tensor, Tensor, Stream, Tensor | None, Norm], Stream]


def rope_table(positions: Tensor, head_dim: int, base: float = 10_000.0) -> Rope:
    """Cosine and sine, (B, T, h/2) float32, of positions (B, T)."""
    exponents = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device) * (2 / head_dim)
    angles = positions[..., None] / base**exponents
    return angles.cos(), angles.sin()


def rms_norm(x: Tensor, factor: Tensor | None, shift: Tensor | None) -> Tensor:
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPSILON)
    if factor is not None:
        normed = normed * factor
    if shift is not None:
        normed = normed + shift
    return normed.to(x.dtype)


def add_rms_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, factor: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = add(x, y, gate)
    return x, rms_norm(x, factor, shift)


def add(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else (x + y * gate).to(x.dtype)


def add_layer_norm(x: Tensor, y: Tensor, factor: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, F.layer_norm(x.float(), x.shape[-1:], factor, shift, NORM_EPSILON).to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def rotate_into_cache(qkv: Tensor, rope: Rope, positions: Tensor, cache: Tensor) -> Tensor:
    kv_heads, head_dim = cache.shape[-2:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    num_heads = heads.shape[2] - 2 * kv_heads
    # Split, not sliced: the gradients of parts come together in one operation.
    rotating, values = heads.split([num_heads + kv_heads, kv_heads], 2)
    queries, keys = rotate(rotating, rope).split([num_heads, kv_heads], 2)
    rows = torch.arange(len(qkv), device=qkv.device)[:, None]
    cache[0, rows, positions] = keys
    cache[1, rows, positions] = values
    return queries


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary position embedding of (B, T, heads, h): element i turns with element i + h/2."""
    cos, sin = rope[0].unsqueeze(-2), rope[1].unsqueeze(-2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def attend_prefix(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    return attend(q, cache[:, :, : q.shape[1]], lengths)


def attend(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    batch, tokens, num_heads, head_dim = q.shape
    keys, values = cache.transpose(2, 3)
    kv_heads = keys.shape[1]
    mask = (torch.arange(cache.shape[2], device=q.device) < lengths[:, None])[:, None, None]
    # The query heads that share a key head become rows of one attention, so that no key is copied for them.
    rows = q.view(batch, tokens, kv_heads, -1, head_dim).transpose(1, 2).reshape(batch, kv_heads, -1, head_dim)
    attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    heads = attended.view(batch, kv_heads, tokens, num_heads // kv_heads, head_dim).transpose(1, 2)
    return heads.reshape(batch, tokens, num_heads, head_dim)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (wide / scale).to(FP8), scale


def stream(x: Tensor, norm: Norm) -> Stream:
    return Stream(x)


def embed(actions: Tensor, weight: Tensor, bias: Tensor, norm: Norm, dtype: torch.dtype) -> Stream:
    return Stream(F.linear(actions, weight, bias).to(dtype))


def read(stream: Stream, norm: Norm, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(rms_norm(stream.x, norm.factor, norm.shift).float(), weight, bias)


def norm_qkv(stream: Stream, norm: Norm, weight: Tensor, span: Span, cache: Tensor) -> Tensor:
    qkv = F.linear(rms_norm(stream.x, norm.factor, norm.shift), weight)
    return rotate_into_cache(qkv, span.rope, span.positions, cache)


def norm_geglu(stream: Stream, norm: Norm, weight: Tensor) -> Tensor:
    return geglu(F.linear(rms_norm(stream.x, norm.factor, norm.shift), weight))


def project_add(y: Tensor, weight: Tensor, stream: Stream, gate: Tensor | None, norm: Norm) -> Stream:
    return Stream(add(stream.x, F.linear(y, weight), gate))


REFERENCE = Ops(
    "reference",
    rms_norm,
    add_rms_norm,
    add_layer_norm,
    linear_gelu,
    rotate_into_cache,
    geglu,
    attend_prefix,
    attend,
    quantise_rows,
    stream,
    embed,
    read,
    norm_qkv,
    norm_geglu,
    project_add,
)
