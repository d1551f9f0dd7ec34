"""Attention, and by what it is computed.

`attend_all` is for tokens that see each other, many queries at once: on an NVIDIA GPU cuDNN's fused kernel, where it
takes the shapes, and einsums everywhere else. `attend` is for few queries over many keys, the prefix's above all:
einsums, for so few queries fill no fused kernel.
"""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

KEYS_MULTIPLE = 16
"""What the number of keys of `attend` should be a multiple of. cuBLAS wants the rows of a matrix, here of attention
weights, 16 bytes or a multiple apart: for others it has slower kernels, or XLA pads the matrix at each use."""

logger = logging.getLogger(__name__)


def attend_all(q: Array, keys: Array, values: Array, lengths: Array | None) -> Array:
    """Attention of tokens to each other, in no order.

    Args:
        q: (B, T, N, h); head n reads key/value head n // (N/K).
        keys: (B, T, K, h).
        values: (B, T, K, h).
        lengths: (B,) int32, at least 1: how many tokens, from the first, may be attended to; None: all.

    Returns:
        (B, T, N·h) in the dtype of q.
    """
    if not is_fused(q.shape[2:], keys.shape[2], q.dtype.name):
        return attend_by_einsum(q, keys, values, lengths)
    return lax.platform_dependent(q, keys, values, lengths, cuda=attend_fused, default=attend_by_einsum)


def attend_by_einsum(q: Array, keys: Array, values: Array, lengths: Array | None) -> Array:
    mask = None if lengths is None else (jnp.arange(q.shape[1]) < lengths[:, None])[:, None, None, None, :]
    return attend(q, keys, values, mask)


def attend_fused(
    q: Array, keys: Array, values: Array, lengths: Array | None, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> Array:
    mixed = jax.nn.dot_product_attention(q, keys, values, key_value_seq_lengths=lengths, implementation=implementation)
    return mixed.reshape(*q.shape[:2], -1)


@functools.cache
def is_fused(heads: tuple[int, int], num_kv_heads: int, dtype: str) -> bool:
    """Whether cuDNN is here and takes (num_heads, head_dim) heads: found out by trying."""
    if jax.default_backend() != "gpu" or dtype not in ("bfloat16", "float16"):
        return False
    try:
        with jax.ensure_compile_time_eval():
            q, keys = (jnp.zeros((1, 16, n, heads[1]), dtype) for n in (heads[0], num_kv_heads))
            jax.block_until_ready(jax.jit(attend_fused)(q, keys, keys, jnp.full(1, 15, jnp.int32)))
    except Exception as error:  # whatever it is, there is another way
        logger.warning("attention of %d heads of %d is not fused: %s", *heads, error)
        return False
    return True


def attend(q: Array, keys: Array, values: Array, mask: Array | None) -> Array:
    """Attention of queries over keys: two products, and one softmax in float32.

    Args:
        q: (B, T, N, h); head n reads key/value head n // (N/K).
        keys: (B, S, K, h).
        values: (B, S, K, h).
        mask: what may be attended to, broadcastable to (B, K, T, N/K, S); None: everything. Every query must be allowed
            some key.

    Returns:
        (B, T, N·h) in the dtype of q.
    """
    batch, length, num_heads, head_dim = q.shape
    q = q.reshape(batch, length, keys.shape[2], -1, head_dim)
    # Tokens before heads: where all heads read one key/value head, nothing is moved for the products, nor after them.
    logits = einsum("btkgh,bskh->bktgs", q, keys) * head_dim**-0.5
    weights = jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, -jnp.inf)).astype(q.dtype)
    mixed = jnp.einsum("bktgs,bskh->btkgh", weights, values, precision=precision_of(values))
    return mixed.reshape(batch, length, num_heads * head_dim)


def einsum(subscripts: str, one: Array, other: Array) -> Array:
    """A product in float32 of arrays of one type."""
    return jnp.einsum(subscripts, one, other, precision=precision_of(one), preferred_element_type=jnp.float32)


def precision_of(factor: Array) -> lax.Precision | None:
    """That of its products: in float32 what is asked for around them, in bfloat16 the only one there is.

    Where any other is asked for, XLA leaves the product to cuBLAS: it neither makes one kernel of it and what is around
    it, nor tries which of the two is faster.
    """
    return lax.Precision.DEFAULT if factor.dtype == jnp.bfloat16 else None


def num_padding(num_keys: int) -> int:
    """Keys to add to so many, so that they are a multiple of `KEYS_MULTIPLE`."""
    return -num_keys % KEYS_MULTIPLE
