"""Writing text with pi0.5's VLM in JAX: prefix, then one token after the other, as functions of the weights.

Reads from the top: `start` reads pictures and prompt and writes the first token, `advance` writes more. What a request
may ask for (how many tokens, how random) is data, never shape, so that each of the two compiles once per shape of the
prefix. The model's parts are those of jax/model.py. Shapes: B batch, S prefix tokens, V vocabulary, D VLM width,
K key/value heads, h head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from openpi_flash_models.config import ModelConfig
from openpi_flash_models.jax import model
from openpi_flash_models.jax.attention import attend, einsum, num_padding
from openpi_flash_models.planner.vocabulary import EOS

CAPACITY = 256
"""Most tokens that can be written. Room for them is cheap: their keys and values are few beside the prefix's."""

DISALLOWED = -1e9
"""Logit of a token that must not be written."""

_TABLE_BLOCK = 8192
"""Rows of the embedding table that a CPU widens at a time."""


class Inputs(NamedTuple):
    """Valid pictures and prompt tokens of one batch, as `request.ModelBatch` has them, on the device."""

    images: Array
    tokens: Array
    token_mask: Array


class Sampling(NamedTuple):
    """How the rows of a batch choose their tokens.

    Attributes:
        max_tokens: (B,) int32, 1 to CAPACITY.
        temperature: (B,) float32; 0: always the likeliest token.
        top_k: (B,) int32, candidates when sampling; 0: all.
        seeds: (B, 2) uint32, the upper and lower half of each row's seed.
    """

    max_tokens: Array
    temperature: Array
    top_k: Array
    seeds: Array


class Prefix(NamedTuple):
    """Where every written token finds pictures and prompt.

    Attributes:
        valid: (B, S) bool, the prefix tokens that may be attended to.
        length: (B,) int32, how many are valid: the position of the first written token.
    """

    valid: Array
    length: Array


class Written(NamedTuple):
    """What has been written.

    Attributes:
        tokens: (B, CAPACITY) int32, zeros behind the last one of each row.
        lengths: (B,) int32, tokens of each row, EOS included.
        done: (B,) bool, whose row has ended.
        sound: (B,) bool, whose tokens were all chosen from finite logits.
        steps: () int32, how often a token was chosen: tokens of the longest row.
        logits: (B, V) float32, from which the newest tokens were chosen.
        caches: of all layers, keys and values of the S prefix tokens, behind them those of the written ones, for which
            there is room of CAPACITY or a little more; the newest token has none yet.
    """

    tokens: Array
    lengths: Array
    done: Array
    sound: Array
    steps: Array
    logits: Array
    caches: model.Caches


def start(
    config: ModelConfig, weights: model.Weights, inputs: Inputs, sampling: Sampling, allowed: Array
) -> tuple[Prefix, Written]:
    """Reads the prefix and writes the first token.

    Args:
        config: sizes; static under `jax.jit`.
        weights: the parts `weights.VLM` of the model.
        inputs: the batch.
        sampling: how its rows choose.
        allowed: (V,) bool, tokens that may be written.
    """
    x, valid = model.embed_prefix(config, weights, *inputs)
    caches, x = model.prefix_forward(config, weights, x, valid)
    length = valid.sum(1, dtype=jnp.int32)
    newest = (length - 1)[:, None]
    last = jnp.take_along_axis(x, newest[..., None], 1)
    last = model.prefix_output(config, weights, last, newest, caches=caches, valid=valid)[:, 0]

    batch, room = len(x), CAPACITY + num_padding(x.shape[1] + CAPACITY)
    nothing = Written(
        tokens=jnp.zeros((batch, CAPACITY), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        sound=jnp.ones(batch, bool),
        steps=jnp.zeros((), jnp.int32),
        logits=tied_logits(weights, last),
        caches=jax.tree.map(
            lambda prefix: jnp.pad(prefix, [*[(0, 0)] * (prefix.ndim - 3), (0, room), (0, 0), (0, 0)]), caches
        ),
    )
    return Prefix(valid, length), write(nothing, sampling, allowed)


def advance(
    config: ModelConfig,
    weights: model.Weights,
    prefix: Prefix,
    written: Written,
    *,
    sampling: Sampling,
    allowed: Array,
    until: Array,
) -> Written:
    """Writes until every row has ended, or `until` tokens are there; not a step further."""

    def unfinished(written: Written) -> Array:
        return ~written.done.all() & (written.steps < until)

    def step(written: Written) -> Written:
        hidden, caches = forward(config, weights, prefix, written)
        return write(written._replace(logits=tied_logits(weights, hidden), caches=caches), sampling, allowed)

    return lax.while_loop(unfinished, step, written)


def forward(
    config: ModelConfig, weights: model.Weights, prefix: Prefix, written: Written
) -> tuple[Array, model.Caches]:
    """Runs the VLM over the newest tokens: their final-normed output (B, D), and the caches with them in it."""
    newest, (batch, prefix_len) = written.steps - 1, prefix.valid.shape
    tokens = lax.dynamic_slice_in_dim(written.tokens, newest, 1, 1)
    rope = model.rope_table((prefix.length + newest)[:, None], config.vlm.head_dim)

    def layer_step(x: Array, layer: model.Weights, cache: model.Cache) -> tuple[Array, model.Cache]:
        room = cache.keys.shape[1] - prefix_len
        is_written = jnp.broadcast_to(jnp.arange(room) <= newest, (batch, room))
        mask = jnp.concatenate([prefix.valid, is_written], 1)[:, None, None, None, :]

        def mix(q: Array, k: Array, v: Array) -> tuple[Array, model.Cache]:
            keys, values = (
                lax.dynamic_update_slice_in_dim(all_of, one, prefix_len + newest, 1)
                for all_of, one in zip(cache, (k, v), strict=True)
            )
            return attend(q, keys, values, mask), model.Cache(keys, values)

        return model.vlm_layer(config.vlm, layer, x, rope, mix)

    x = model.embed_prompt(weights, tokens)
    x, caches = model.through_layers(layer_step, x, weights["vlm_layers"], written.caches)
    return model.rms_norm(x, 1 + weights["vlm_norm"])[:, 0], caches


def write(written: Written, sampling: Sampling, allowed: Array) -> Written:
    """Chooses the next token of every row from `written.logits`; rows that have ended get a 0."""
    chosen = jnp.where(written.done, 0, choose(written.logits, written.steps, sampling, allowed))
    lengths = written.lengths + ~written.done
    is_finite = jnp.isfinite(written.logits.max(-1))  # of NaN and others the largest is NaN
    return written._replace(
        tokens=lax.dynamic_update_slice_in_dim(written.tokens, chosen[:, None], written.steps, 1),
        lengths=lengths,
        done=written.done | (chosen == EOS) | (lengths >= sampling.max_tokens),
        sound=written.sound & (written.done | is_finite),
        steps=written.steps + 1,
    )


def choose(logits: Array, step: Array, sampling: Sampling, allowed: Array) -> Array:
    """(B, V) float32 logits to (B,) int32 tokens; of equal ones the lowest id."""
    logits = jnp.where(allowed, logits, DISALLOWED)
    # One question for each token: on a GPU the host answers it, and waits for the device to do so.
    logits = lax.cond((sampling.temperature > 0).any(), perturb, lambda logits, *_: logits, logits, step, sampling)
    return logits.argmax(-1).astype(jnp.int32)


def perturb(logits: Array, step: Array, sampling: Sampling) -> Array:
    """The logits whose largest is a sample of what each row may choose from."""
    # Sorting a vocabulary costs as much as computing its logits: only those pay who asked for it.
    wants_top_k = (sampling.top_k > 0).any()
    logits = lax.cond(wants_top_k, keep_top_k, lambda logits, _: logits, logits, sampling.top_k)
    return add_noise(logits, step, sampling)


def keep_top_k(logits: Array, top_k: Array) -> Array:
    """Disallows all but the k largest of each row, and what equals the k-th; 0 keeps all."""
    size = logits.shape[-1]
    kth = jnp.where(top_k > 0, size - jnp.minimum(top_k, size), 0)
    least = jnp.take_along_axis(jnp.sort(logits), kth[:, None], 1)
    return jnp.where(logits >= least, logits, DISALLOWED)


def add_noise(logits: Array, step: Array, sampling: Sampling) -> Array:
    """Gumbel noise times temperature: its largest element is a sample of the softmax of logits / temperature.

    A row's noise depends on its own seed and the step alone.
    """

    def noise(words: Array) -> Array:
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:], jnp.float32)

    return logits + sampling.temperature[:, None] * jax.vmap(noise)(sampling.seeds)


def tied_logits(weights: model.Weights, hidden: Array) -> Array:
    """(B, D) to (B, V) float32: the products with the embedding table, unscaled."""
    table = weights["embedding"]
    if table.dtype != jnp.uint16:
        return einsum("bd,vd->bv", hidden, table)
    # Weights that a CPU holds as bits (`model.numbers`), in blocks: it widens what it multiplies, here a table of 1 GB.
    rows = len(table)
    block = min(rows, _TABLE_BLOCK)

    def fill(i: Array, logits: Array) -> Array:
        first = jnp.minimum(i * block, rows - block)
        part = model.numbers(lax.dynamic_slice_in_dim(table, first, block))
        return lax.dynamic_update_slice_in_dim(logits, einsum("bd,vd->bv", hidden, part), first, 1)

    return lax.fori_loop(0, -(-rows // block), fill, jnp.zeros((len(hidden), rows), jnp.float32))
