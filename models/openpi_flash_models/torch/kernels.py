"""The operations between the model's matrix products, each twice: in plain PyTorch, and as one Triton kernel.

A flow step is short: on a GPU its time is that of its launches and of what they read and write between the products.
Each operation below is a dozen kernels in plain PyTorch and one here. `REFERENCE` is what they compute, on any device
and for any compiler; `FUSED` is the same on a GPU where Triton and a C compiler for its launcher are at hand. `choose`
takes `FUSED` only where each of its operations gives what the reference gives, on that device.

Shapes: B batch, T tokens, W width of a row, N query heads, K key/value heads, h head_dim, C capacity of a cache.
No fused operation can be differentiated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from openpi_flash_models.config import ModelConfig

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for this platform: the reference serves
    triton = None

logger = logging.getLogger(__name__)

NORM_EPSILON = 1e-6
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest number of FP8."""

Rope = tuple[Tensor, Tensor]
"""Cosine and sine of tokens' rotations, (B or 1, T, h/2) float32."""


class Ops(NamedTuple):
    """One implementation of every operation. Where a factor, shift or gate is None, it is left out.

    Attributes:
        name: `reference` or `fused`.
        rms_norm: (x (B, T, W), factor (W,), shift (W,)) to x over its root mean square, times factor, plus shift.
        add_rms_norm: (x, y, gate (W,), factor, shift) to x + y·gate, rounded to the dtype of x, and the norm of that.
        rotate_into_cache: (qkv (B, T, (N+2K)·h), rope, positions (B or 1, T), cache) to the rotated queries
            (B, T, N, h); writes the rotated keys and the values to their positions of the cache (2, B, C, K, h).
        geglu: (B, T, 2W), gate and up, to gelu(gate)·up, (B, T, W).
        attend_prefix: (q (B, T, N, h), cache, lengths (B,) int32) to (B, T, N, h): each row attends to the first
            `lengths` entries of its cache. For about as many queries as keys.
        attend_suffix: the same, for few queries.
        quantise_rows: (rows, W) to FP8 and what each row was divided by, (rows, 1) float32.
    """

    name: str
    rms_norm: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
    rotate_into_cache: Callable[[Tensor, Rope, Tensor, Tensor], Tensor]
    geglu: Callable[[Tensor], Tensor]
    attend_prefix: Callable[[Tensor, Tensor, Tensor], Tensor]
    attend_suffix: Callable[[Tensor, Tensor, Tensor], Tensor]
    quantise_rows: Callable[[Tensor], tuple[Tensor, Tensor]]


def choose(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Ops:
    """The fastest implementation that works on the device; says in the log why where that is the reference."""
    if device.type != "cuda":
        return REFERENCE
    if triton is None:
        reason = "Triton is not installed"
    else:
        try:
            with torch.cuda.device(device), torch.inference_mode():
                wrong = mismatches(FUSED, config, device, dtype)
        except Exception as error:  # no C compiler, a GPU that Triton does not know, too little shared memory, …
            reason = f"{type(error).__name__}: {error}"
        else:
            if not wrong:
                return FUSED
            reason = f"{', '.join(wrong)} gave other numbers than plain PyTorch"
    logger.warning("fused kernels are off, inference will be slower: %s", reason)
    return REFERENCE


def mismatches(ops: Ops, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the operations whose result is not the reference's, at a model's widths, up to rounding."""
    wrong = []
    for name, arguments in trials(config, device, dtype):
        expected_arguments = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
        expected = getattr(REFERENCE, name)(*expected_arguments)
        actual = getattr(ops, name)(*arguments)
        # What was written into an argument counts as well.
        pairs = zip(
            (*_tensors(actual), *_tensors(arguments)), (*_tensors(expected), *_tensors(expected_arguments)), strict=True
        )
        if not all(_close(one, other) for one, other in pairs):
            wrong.append(name)
    return wrong


def trials(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, list[Any]]]:
    """A small call of every operation for each width that the model has: its name and arguments."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    gemma = config.vlm
    for width in {config.vlm.width, config.expert.width}:
        x, y = random(2, 3, width), random(2, 3, width)
        gate, factor, shift = (random(width, dtype=torch.float32) for _ in range(3))
        yield "rms_norm", [x, None, None]
        yield "rms_norm", [x, factor, shift]
        yield "add_rms_norm", [x, y, None, None, None]
        yield "add_rms_norm", [x, y, gate, factor, shift]
    for mlp_dim in {config.vlm.mlp_dim, config.expert.mlp_dim}:
        yield "geglu", [random(2, 3, 2 * mlp_dim)]
    capacity, lengths = 40, torch.tensor([40, 33], dtype=torch.int32, device=device)
    cache = random(2, 2, capacity, gemma.num_kv_heads, gemma.head_dim)
    for tokens, name in ((17, "attend_prefix"), (5, "attend_suffix")):
        qkv = random(2, tokens, (gemma.num_heads + 2 * gemma.num_kv_heads) * gemma.head_dim)
        positions = (lengths[:, None] - tokens).clamp(min=0) + torch.arange(tokens, device=device)
        rope = rope_table(positions, gemma.head_dim)
        yield "rotate_into_cache", [qkv, rope, positions, cache.clone()]
        yield name, [random(2, tokens, gemma.num_heads, gemma.head_dim), cache, lengths]
    # Exact in FP8 but for a power of two in each row: the last bit of a rounding is nobody's promise.
    exact = random(5, config.vlm.width, dtype=torch.float32).to(FP8).float()
    exact[:, 0] = FP8_MAX
    yield "quantise_rows", [(exact * 2.0 ** torch.arange(-2, 3, device=device)[:, None]).to(dtype)]


def rope_table(positions: Tensor, head_dim: int, base: float = 10_000.0) -> Rope:
    """Cosine and sine, (B, T, h/2) float32, of positions (B, T)."""
    exponents = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device) * (2 / head_dim)
    angles = positions[..., None] / base**exponents
    return angles.cos(), angles.sin()


def _tensors(values: Any) -> list[Tensor]:
    values = (values,) if isinstance(values, Tensor) else values
    return [value for value in values if isinstance(value, Tensor)]


def _close(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    tolerance = {torch.bfloat16: 2e-2, FP8: 0.0}.get(one.dtype, 1e-4)
    return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)


# --- In plain PyTorch


def rms_norm(x: Tensor, factor: Tensor | None, shift: Tensor | None) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPSILON)
    if factor is not None:
        normed = normed * factor
    if shift is not None:
        normed = normed + shift
    return normed.to(x.dtype)


def add_rms_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, factor: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x + y if gate is None else (x + y * gate).to(x.dtype)
    return x, rms_norm(x, factor, shift)


def rotate_into_cache(qkv: Tensor, rope: Rope, positions: Tensor, cache: Tensor) -> Tensor:
    kv_heads, head_dim = cache.shape[-2:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    rotated = rotate(heads[:, :, :-kv_heads], rope)
    rows = torch.arange(len(qkv), device=qkv.device)[:, None]
    cache[0, rows, positions] = rotated[:, :, -kv_heads:]
    cache[1, rows, positions] = heads[:, :, -kv_heads:]
    return rotated[:, :, :-kv_heads]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary position embedding of (B, T, heads, h): element i turns with element i + h/2."""
    cos, sin = rope[0].unsqueeze(-2), rope[1].unsqueeze(-2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


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


REFERENCE = Ops("reference", rms_norm, add_rms_norm, rotate_into_cache, geglu, attend, attend, quantise_rows)


# --- In Triton


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
        EPSILON=NORM_EPSILON,
        ADD=y is not None,
        GATE=gate is not None,
        FACTOR=factor is not None,
        SHIFT=shift is not None,
        BLOCK=triton.next_power_of_2(width),
    )
    return total, normed


def fused_rotate_into_cache(qkv: Tensor, rope: Rope, positions: Tensor, cache: Tensor) -> Tensor:
    batch, tokens, _ = qkv.shape
    _, _, capacity, kv_heads, head_dim = cache.shape
    num_heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    q = qkv.new_empty(batch, tokens, num_heads, head_dim)
    cos, sin = (table.contiguous() for table in rope)
    _rotate_kernel[(batch * tokens, num_heads + 2 * kv_heads)](
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
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )
    return q


def fused_geglu(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    block = min(1024, triton.next_power_of_2(width))
    _geglu_kernel[(gate_up.numel() // (2 * width), triton.cdiv(width, block))](gate_up, out, width, BLOCK=block)
    return out


def fused_attend_suffix(q: Tensor, cache: Tensor, lengths: Tensor, *, num_splits: int = 8) -> Tensor:
    """The keys of a row are shared out to `num_splits` programs, since a few queries alone would leave most of a GPU
    idle; a second kernel joins what they found (Dao et al., Flash-Decoding)."""
    q = q.contiguous()
    batch, tokens, num_heads, head_dim = q.shape
    _, _, capacity, kv_heads, _ = cache.shape
    rows = tokens * (num_heads // kv_heads)
    shares = q.new_empty(num_splits, batch, kv_heads, rows, head_dim, dtype=torch.float32)
    weights = q.new_empty(2, num_splits, batch, kv_heads, rows, dtype=torch.float32)
    block_rows, block_keys = 64, 32
    share = triton.cdiv(triton.cdiv(capacity, block_keys), num_splits) * block_keys
    sizes = {"NUM_HEADS": num_heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim}
    block_dim = max(16, triton.next_power_of_2(head_dim))
    _attend_kernel[(triton.cdiv(rows, block_rows), batch * kv_heads, num_splits)](
        q,
        cache,
        lengths,
        shares,
        weights,
        rows,
        capacity,
        batch,
        cache[0].numel(),
        share,
        head_dim**-0.5,
        **sizes,
        BLOCK_ROWS=block_rows,
        BLOCK_KEYS=block_keys,
        BLOCK_DIM=block_dim,
        num_warps=4,
        num_stages=2,
    )
    out = torch.empty_like(q)
    _join_kernel[(batch * kv_heads * rows,)](
        shares,
        weights,
        out,
        rows,
        batch,
        **sizes,
        SPLITS=num_splits,
        BLOCK_SPLITS=triton.next_power_of_2(num_splits),
        BLOCK_DIM=block_dim,
        num_warps=1,
    )
    return out


def flash_attend_prefix(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """PyTorch's FlashAttention, which takes lengths in place of a mask, and half precision alone."""
    if q.dtype == torch.float32:
        return attend(q, cache, lengths)
    from torch.nn.attention.varlen import varlen_attn

    batch, tokens, num_heads, head_dim = q.shape
    _, _, capacity, kv_heads, _ = cache.shape
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    keys, values = cache.flatten(1, 2)
    attended = varlen_attn(
        q.reshape(-1, num_heads, head_dim),
        keys,
        values,
        starts * tokens,
        starts * capacity,
        tokens,
        capacity,
        enable_gqa=kv_heads != num_heads,
        seqused_k=lengths,
    )
    assert isinstance(attended, Tensor)  # noqa: S101 - nothing beside it was asked for
    return attended.view(batch, tokens, num_heads, head_dim)


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
    fused_rotate_into_cache,
    fused_geglu,
    flash_attend_prefix,
    fused_attend_suffix,
    fused_quantise_rows,
)

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
    at = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            y *= tl.load(gate_ptr + columns, mask=inside, other=0.0)
        total = (x + y).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
        x = total.to(tl.float32)  # the norm is that of the rounded sum
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
    BLOCK: tl.constexpr,
):
    """One program: one head of one token."""
    token, head = tl.program_id(0), tl.program_id(1)
    row, column = token // tokens, token % tokens
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    source = qkv_ptr + (token.to(tl.int64) * (NUM_HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + i
    first, second = tl.load(source, mask=inside, other=0.0), tl.load(source + HALF, mask=inside, other=0.0)
    if head < NUM_HEADS + KV_HEADS:
        at = (row * rope_batch_stride + column) * HALF + i
        cos = tl.load(cos_ptr + at, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        first = (wide_first * cos - wide_second * sin).to(first.dtype)
        second = (wide_second * cos + wide_first * sin).to(second.dtype)
    if head < NUM_HEADS:
        target = q_ptr + (token.to(tl.int64) * NUM_HEADS + head) * (2 * HALF) + i
    else:
        position = tl.load(positions_ptr + row * position_batch_stride + column)
        kv_head = (head - NUM_HEADS) % KV_HEADS
        target = cache_ptr + ((row.to(tl.int64) * capacity + position) * KV_HEADS + kv_head) * (2 * HALF) + i
        if head >= NUM_HEADS + KV_HEADS:
            target += values_offset
    tl.store(target, first, mask=inside)
    tl.store(target + HALF, second, mask=inside)


@jit
def _geglu_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: a block of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    source = gate_up_ptr + row * 2 * width + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0)
    # gelu in its tanh form; tanh(z) = 2·sigmoid(2z) - 1, so that 0.5·(1 + tanh(z)) = sigmoid(2z).
    activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    product = activated.to(up.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * width + columns, product.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    cache_ptr,
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
):
    """One program: a block of the rows (token, head of the group) of one key head, against one share of the keys.

    Writes the sum of values weighted by exp(logit - most), `most` being the largest logit, and `most` and the sum of
    the weights.
    """
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b, kv = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    split = tl.program_id(2)
    d = tl.arange(0, BLOCK_DIM)
    is_row, is_dim = r < rows, d < HEAD_DIM

    token_head = (b * (rows // GROUP) + r // GROUP) * NUM_HEADS + kv * GROUP + r % GROUP
    q = tl.load(
        q_ptr + token_head[:, None].to(tl.int64) * HEAD_DIM + d[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    keys_ptr = cache_ptr + (b.to(tl.int64) * capacity * KV_HEADS + kv) * HEAD_DIM
    values_ptr = keys_ptr + values_offset

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
        keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
        logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where(is_key[None, :], logits, -1e30)
        highest = tl.maximum(most, tl.max(logits, 1))
        weights = tl.where(is_key[None, :], tl.exp(logits - highest[:, None]), 0.0)
        shrink = tl.exp(most - highest)
        values = tl.load(values_ptr + at, mask=inside, other=0.0)
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
):
    """One program: what the shares of the keys gave one row, as one attention."""
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    row = tl.program_id(0)
    r, group = row % rows, row // rows
    b, kv = group // KV_HEADS, group % KV_HEADS
    s, d = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DIM)
    is_split, is_dim = s < SPLITS, d < HEAD_DIM
    per_split = batch * KV_HEADS * rows
    most = tl.load(weights_ptr + s * per_split + row, mask=is_split, other=-1e30)
    totals = tl.load(weights_ptr + (SPLITS + s) * per_split + row, mask=is_split, other=0.0)
    shrink = tl.exp(most - tl.max(most, 0))
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
