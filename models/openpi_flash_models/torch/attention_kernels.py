"""Attention as Triton kernels: of the flow steps, few queries, and of the prefix. Shapes are those of ops.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from openpi_flash_models.torch.launch import is_for_hopper, jit, overlap, tl, triton, wait
from openpi_flash_models.torch.ops import attend_prefix

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor


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


SUFFIX_TILES = {"BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 2}
"""For attention of the flow steps on Hopper."""


SUFFIX_SPLITS = 14
"""Programs to which the keys of one robot's flow step are shared out: about one for each block of keys."""


def fused_attend_suffix(q: Tensor, cache: Tensor, lengths: Tensor, **tiles: int) -> Tensor:
    """The keys of a row are shared out to `splits` programs, since a few queries alone would leave most of a GPU idle;
    a second kernel joins what they found (Dao et al., Flash-Decoding)."""
    q = q.contiguous()
    batch, tokens, num_heads, head_dim = q.shape
    _, _, capacity, kv_heads, _ = cache.shape
    rows = tokens * (num_heads // kv_heads)
    overlapped = overlap(q)
    tile = {"BLOCK_ROWS": 64, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2}
    if q.dtype == torch.float32:
        # Multiplied outside of the tensor cores: the tiles of these would not fit into registers, nor into the shared
        # memory of a consumer's GPU.
        tile |= {"BLOCK_ROWS": 32, "BLOCK_KEYS": 16, "num_warps": 8}
    elif not overlapped["OVERLAP"]:  # factors pass through registers
        tile["num_warps"] = 8
    else:
        tile |= SUFFIX_TILES
    tile["splits"] = triton.cdiv(SUFFIX_SPLITS, batch)  # several robots keep a GPU busy with fewer
    tile |= {"TMA": q.device.type != "cpu" and is_for_hopper(q)} | overlapped | tiles
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
        **{name: tile[name] for name in overlapped},
    )
    return out


def hopper_attend_prefix(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """`tiled_attend_prefix` on the GPUs for whose tensor cores and shared memory it is written; others' FlashAttention
    is PyTorch's."""
    attend = tiled_attend_prefix if is_for_hopper(q) else flash_attend_prefix
    return attend(q, cache, lengths)


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
        head_dim**-0.5 * math.log2(math.e),
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

    wait(OVERLAP)
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
    wait(OVERLAP)
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
