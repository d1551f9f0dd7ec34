"""pi0 and pi0.5 in JAX, inference only: everything from camera images to an action chunk, as functions of the weights.

Reads from the top: `sample_actions` is the whole computation, and every function below it is one of its parts. The
weights are nested dicts of arrays, layers of one kind stacked on axis 0 or each on its own (weights.py lists them, and
says which when). The arithmetic follows SPEC §1.
Shapes: B batch, V views, S prefix tokens, n suffix tokens, H action horizon, A action_dim, D VLM width, E expert width,
N query heads, K key/value heads, h head_dim, L layers.

Precision: matrices and activations of the vision tower and the two experts are in the compute dtype, that of the
weights; the statistics of every norm, rotations, softmax, patch and position embedding and all that touches actions,
state and time are in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from openpi_flash_models import flow, realtime
from openpi_flash_models.config import GemmaConfig, ModelConfig
from openpi_flash_models.jax.attention import attend, attend_all, num_padding, precision_of
from openpi_flash_models.pixels import PIXEL_VALUES

Weights = dict[str, Any]
Layers = Weights | list[Weights]
"""The layers of one kind: a stack, whose arrays have them on axis 0, or a list. See `through_layers`."""

ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-6


class Inputs(NamedTuple):
    """One batch, as `request.ModelBatch` has it, on the device."""

    images: Array
    tokens: Array
    token_mask: Array
    state: Array
    noise: Array


class Schedule(NamedTuple):
    """What a flow step needs and no request changes, one row per step. All float32.

    Attributes:
        modulation: (steps, L, 2, 3, E): for both norms of each expert layer, the factor on the normed vector, what is
            added to it, and the gate on the output of the block behind it.
        final_modulation: (steps, 2, E): factor and addition of the expert's final norm.
        time_bias: (steps, E): the share of the time embedding in pi0's `action_time_mlp_in`; None in pi0.5.
    """

    modulation: Array
    final_modulation: Array
    time_bias: Array | None


class Cache(NamedTuple):
    """Keys (rotated) and values of one layer, each (B, T, K, h), or of a stack of layers, (L, B, T, K, h)."""

    keys: Array
    values: Array


Caches = Cache | list[Cache]
"""Those of all layers, as the layers are: a stack, or a list."""


class Rope(NamedTuple):
    """Rotation of tokens: cosine and sine, (B, T, 1, h/2) float32."""

    cos: Array
    sin: Array


class Context(NamedTuple):
    """What the suffix tokens of one batch meet in every flow step.

    Attributes:
        caches: of the prefix.
        mask: what suffix tokens may attend to, see `suffix_mask`.
        rope: rotation of the suffix tokens.
        state_token: (B, 1, E) float32 in pi0; None in pi0.5.
        committed: actions that are not for the flow to change; None: all are.
    """

    caches: Caches
    mask: Array
    rope: Rope
    state_token: Array | None
    committed: "Committed | None" = None


class Guided(NamedTuple):
    """Chunks that are continued by guidance: what `realtime.Continuation` has, of a batch."""

    actions: Array
    weights: Array


class Committed(NamedTuple):
    """Chunks that are continued by a model which was trained for it: their first steps are given.

    Attributes:
        actions: (B, H, A) float32.
        mask: (B, H, 1) bool, which of them are given.
        done: a row of a schedule, of the end of the flow: what given actions meet in every flow step.
    """

    actions: Array
    mask: Array
    done: Schedule


def sample_actions(
    config: ModelConfig,
    weights: Weights,
    schedule: Schedule,
    inputs: Inputs,
    continues: Guided | Committed | None = None,
) -> Array:
    """Runs the flow from noise to actions, (B, H, A) float32. `config` is static under `jax.jit`.

    Args:
        config: sizes.
        weights: of the model.
        schedule: a row for each flow step.
        inputs: the batch.
        continues: the chunks that those of the batch continue (realtime.py); None: they begin afresh.
    """
    context, x = prepare(config, weights, inputs), inputs.noise
    if isinstance(continues, Guided):
        return sample_guided(config, weights, schedule, context, noise=x, previous=continues)
    if continues is not None:
        context, x = context._replace(committed=continues), jnp.where(continues.mask, continues.actions, x)
    dt = flow.step_size(len(schedule.modulation))

    def flow_step(x: Array, step: Schedule) -> tuple[Array, None]:
        v = velocity(config, weights, x, step, context)
        return x + dt * (v if continues is None else jnp.where(continues.mask, 0, v)), None

    return lax.scan(flow_step, x, schedule)[0]


def sample_guided(
    config: ModelConfig, weights: Weights, schedule: Schedule, context: Context, *, noise: Array, previous: Guided
) -> Array:
    """The flow, at each step drawn towards the chunks before: the velocity, corrected by a vector-Jacobian product.

    arXiv 2506.07339, eqs. 2 and 3; openpi's velocity points from actions to noise, the paper's the other way.
    """
    num_steps = len(schedule.modulation)
    dt, times, guidance = flow.step_size(num_steps), flow.timesteps(num_steps), realtime.guidance(num_steps)

    def flow_step(x: Array, of_step: tuple[Schedule, Array, Array]) -> tuple[Array, None]:
        step, t, strength = of_step

        def estimate(x: Array) -> tuple[Array, Array]:
            v = velocity(config, weights, x, step, context)
            return x - t * v, v

        actions, pull_back, v = jax.vjp(estimate, x, has_aux=True)
        (correction,) = pull_back(previous.weights[..., None] * (previous.actions - actions))
        return x + dt * (v - strength * correction), None

    return lax.scan(flow_step, noise, (schedule, jnp.asarray(times), jnp.asarray(guidance)))[0]


def prepare(config: ModelConfig, weights: Weights, inputs: Inputs) -> Context:
    """All of the work that is done once per batch, whatever the number of flow steps."""
    prefix, valid = embed_prefix(config, weights, inputs.images, inputs.tokens, inputs.token_mask)
    caches, _ = prefix_forward(config, weights, prefix, valid)
    rope = rope_table(valid.sum(1)[:, None] + jnp.arange(config.suffix_len), config.expert.head_dim)
    state_token = None if config.is_pi05 else linear(weights, "state_proj", inputs.state)[:, None]
    return Context(caches, suffix_mask(config, valid), rope, state_token)


def embed_prefix(
    config: ModelConfig, weights: Weights, images: Array, tokens: Array, token_mask: Array
) -> tuple[Array, Array]:
    """Prefix tokens (B, S, D) in the compute dtype, cameras then prompt, and which of them are valid (B, S)."""
    prompt = embed_prompt(weights, tokens)
    batch, num_views = images.shape[:2]
    if num_views == 0:
        return prompt, token_mask
    views = embed_images(config, weights, images.reshape(batch * num_views, *images.shape[2:]))
    views = views.reshape(batch, -1, prompt.shape[-1])
    valid = jnp.concatenate([jnp.ones(views.shape[:2], bool), token_mask], 1)
    return jnp.concatenate([views, prompt], 1), valid


def embed_prompt(weights: Weights, tokens: Array) -> Array:
    """(B, P) token ids to (B, P, D). Only text is scaled by sqrt(D)."""
    rows = numbers(weights["embedding"][tokens])
    return (rows.astype(jnp.float32) * math.sqrt(rows.shape[-1])).astype(rows.dtype)


def embed_images(config: ModelConfig, weights: Weights, images: Array) -> Array:
    """The vision tower and the projection to the VLM's width: (views, size, size, 3) to (views, tokens, D)."""
    vision = weights["vision"]
    return project(vision, encode_patches(config, vision, embed_patches(config, vision, images)))


def project(vision: Weights, x: Array) -> Array:
    return dot(x, vision["projector"], vision["projector_bias"])


def embed_patches(config: ModelConfig, vision: Weights, images: Array) -> Array:
    """Patches in row-major order, projected, plus positions: (views, tokens, width)."""
    if images.dtype == jnp.uint8:
        images = jnp.asarray(PIXEL_VALUES)[images]
    size = config.vision.patch_size
    views, height, width, _ = images.shape
    patches = images.reshape(views, height // size, size, width // size, size, 3).swapaxes(2, 3)
    patches = patches.reshape(views, -1, size * size * 3)
    embedded = patches @ vision["patch"] + vision["patch_bias"] + vision["position"]
    return embedded.astype(numbers(vision["projector"]).dtype)


def encode_patches(config: ModelConfig, vision: Weights, x: Array) -> Array:
    """The blocks of the vision tower and its final norm."""
    x, _ = through_layers(lambda x, block: (vision_block(config, block, x), None), x, vision["blocks"])
    return layer_norm(x, vision["norm_scale"], vision["norm_bias"])


def vision_block(config: ModelConfig, block: Weights, x: Array) -> Array:
    normed = layer_norm(x, block["norm1_scale"], block["norm1_bias"])
    qkv = dot(normed, block["qkv"], block["qkv_bias"]).reshape(*x.shape[:2], 3, config.vision.num_heads, -1)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    x = x + dot(attend_all(q, k, v, None), block["out"], block["out_bias"])
    normed = layer_norm(x, block["norm2_scale"], block["norm2_bias"])
    inner = jax.nn.gelu(dot(normed, block["fc1"], block["fc1_bias"]), approximate=True)
    return x + dot(inner, block["fc2"], block["fc2_bias"])


def prefix_forward(config: ModelConfig, weights: Weights, x: Array, valid: Array) -> tuple[Caches, Array]:
    """Runs the VLM over the prefix, up to the keys and values of its last layer: the actions need no more.

    Args:
        config: sizes.
        weights: of the whole model.
        x: (B, S, D) prefix tokens. Padding is on the right, so that positions count up from 0.
        valid: (B, S) bool.

    Returns:
        The caches of the S prefix tokens, and the tokens before the last layer (B, S, D), for `prefix_output`.
    """
    gemma, layers = config.vlm, weights["vlm_layers"]
    rope, lengths = rope_table(jnp.arange(x.shape[1])[None], gemma.head_dim), valid.sum(1, dtype=jnp.int32)

    def mix(q: Array, k: Array, v: Array) -> tuple[Array, Cache]:
        return attend_all(q, k, v, lengths), Cache(k, v)

    last = gemma.depth - 1
    x, caches = through_layers(lambda x, layer: vlm_layer(gemma, layer, x, rope, mix), x, layers, count=last)
    layer = layer_at(layers, last)
    cache = Cache(*project_kv(gemma, layer["qkv"], rms_norm(x, 1 + layer["norm1"]), rope))
    if isinstance(caches, list):
        return [*caches, cache], x
    return jax.tree.map(lambda most, one: jnp.concatenate([most, one[None]]), caches, cache), x


def prefix_output(
    config: ModelConfig, weights: Weights, x: Array, positions: Array, *, caches: Caches, valid: Array
) -> Array:
    """The VLM's final-normed output (B, n, D) at some tokens of the prefix.

    Args:
        config: sizes.
        weights: of the whole model.
        x: (B, n, D) these tokens before the last layer.
        positions: (B or 1, n), theirs.
        caches: of the prefix.
        valid: (B, S) bool.
    """
    gemma, last = config.vlm, config.vlm.depth - 1
    layer, cache = layer_at(weights["vlm_layers"], last), layer_at(caches, last)
    q, _, _ = project_qkv(gemma, layer["qkv"], rms_norm(x, 1 + layer["norm1"]), rope_table(positions, gemma.head_dim))
    x = x + dot(attend(q, cache.keys, cache.values, valid[:, None, None, None, :]), layer["out"])
    return rms_norm(x + mlp(layer, rms_norm(x, 1 + layer["norm2"])), 1 + weights["vlm_norm"])


def vlm_layer(
    gemma: GemmaConfig, layer: Weights, x: Array, rope: Rope, mix: Callable[[Array, Array, Array], tuple[Array, Cache]]
) -> tuple[Array, Cache]:
    """One layer of the VLM over tokens (B, T, D).

    Args:
        gemma: sizes.
        layer: its weights.
        x: the tokens.
        rope: their rotation.
        mix: attention: of their queries, keys and values, its output (B, T, N·h), and the keys and values to keep.

    Returns:
        The tokens after it, and what `mix` keeps.
    """
    mixed, cache = mix(*project_qkv(gemma, layer["qkv"], rms_norm(x, 1 + layer["norm1"]), rope))
    x = x + dot(mixed, layer["out"])
    return x + mlp(layer, rms_norm(x, 1 + layer["norm2"])), cache


def velocity(config: ModelConfig, weights: Weights, x: Array, step: Schedule, context: Context) -> Array:
    """v(x, t) of one flow step, (B, H, A) float32. `step` is one row of a schedule."""
    out = suffix_forward(config, weights, embed_suffix(weights, x, step, context), step, context)
    return linear(weights, "action_out_proj", out[:, -x.shape[1] :].astype(jnp.float32))


def embed_suffix(weights: Weights, x: Array, step: Schedule, context: Context) -> Array:
    """Suffix tokens (B, n, E) in the compute dtype."""
    dtype = numbers(weights["embedding"]).dtype
    actions = linear(weights, "action_in_proj", x)
    if context.state_token is None:
        return actions.astype(dtype)
    time_bias, committed = step.time_bias, context.committed
    if committed is not None:
        assert time_bias is not None and committed.done.time_bias is not None  # noqa: S101 - of pi0
        time_bias = jnp.where(committed.mask, committed.done.time_bias, time_bias)
    mixed = jax.nn.silu(actions @ weights["action_time_mlp_in"] + time_bias)
    return jnp.concatenate([context.state_token, linear(weights, "action_time_mlp_out", mixed)], 1).astype(dtype)


def suffix_forward(config: ModelConfig, weights: Weights, x: Array, step: Schedule, context: Context) -> Array:
    """Runs the action expert over the suffix tokens; returns its final-normed output (B, n, E)."""
    gemma, committed = config.expert, context.committed
    done = None if committed is None else committed.done
    if committed is not None:
        is_done = jnp.pad(committed.mask, ((0, 0), (config.suffix_len - config.action_horizon, 0), (0, 0)))

    def of_tokens(rows: Array, rows_done: Array | None) -> Array:
        """Rows (k, E) of a schedule as tokens meet them: (k, B, n, E) where some are done, for whom others hold."""
        return rows if rows_done is None else jnp.where(is_done, rows_done[:, None, None], rows[:, None, None])

    def behind(prefix: Array, own: Array) -> Array:
        """Keys or values of the suffix tokens behind those of the prefix, as `suffix_mask` has them."""
        padding = context.mask.shape[-1] - prefix.shape[1] - own.shape[1]
        return jnp.concatenate([prefix, jnp.pad(own, ((0, 0), (0, padding), (0, 0), (0, 0)))], 1)

    def layer_step(
        x: Array, layer: Weights, modulation: Array, modulation_done: Array | None, prefix: Cache
    ) -> tuple[Array, None]:
        parts = [of_tokens(modulation[k], None if modulation_done is None else modulation_done[k]) for k in range(2)]
        factor, shift, gate = parts[0]
        q, k, v = project_qkv(gemma, layer["qkv"], rms_norm(x, factor, shift), context.rope)
        attended = attend(q, behind(prefix.keys, k), behind(prefix.values, v), context.mask)
        x = (x + dot(attended, layer["out"]) * gate).astype(x.dtype)
        factor, shift, gate = parts[1]
        return (x + mlp(layer, rms_norm(x, factor, shift)) * gate).astype(x.dtype), None

    along = (step.modulation, None if done is None else done.modulation, context.caches)
    x, _ = through_layers(layer_step, x, weights["expert_layers"], *along)
    factor, shift = of_tokens(step.final_modulation, None if done is None else done.final_modulation)
    return rms_norm(x, factor, shift)


def suffix_mask(config: ModelConfig, valid: Array) -> Array:
    """What suffix tokens may attend to: (B, 1, 1 or n, 1, keys) bool, of keys those of the prefix, theirs, and padding.

    Of each other they see all, except that pi0's state token sees no action.
    """
    (batch, prefix_len), length = valid.shape, config.suffix_len
    own = jnp.ones((1, length), bool) if config.is_pi05 else jnp.ones((length, length), bool).at[0, 1:].set(False)
    own = jnp.pad(own, ((0, 0), (0, num_padding(prefix_len + length))))
    parts = (jnp.broadcast_to(part, (batch, len(own), part.shape[-1])) for part in (valid[:, None], own))
    return jnp.concatenate([*parts], -1)[:, None, :, None, :]


def make_schedule(config: ModelConfig, time_weights: Weights, time_embeddings: Array) -> Schedule:
    """Everything that depends only on the times of the steps.

    Args:
        config: sizes.
        time_weights: the `time` part of the weights.
        time_embeddings: (steps, E) float32.
    """
    steps, width = time_embeddings.shape
    cond = condition(time_weights, time_embeddings) if config.is_pi05 else None

    def modulation(norm: Weights) -> Array:
        if cond is None:
            scale = norm["scale"]
            plain = jnp.stack([1 + scale, jnp.zeros_like(scale), jnp.ones_like(scale)])
            return jnp.broadcast_to(plain, (steps, 3, width))
        kernel, bias = (numbers(norm[name]).astype(jnp.float32) for name in ("kernel", "bias"))
        return (cond @ kernel + bias).reshape(steps, 3, width).at[:, 0].add(1)

    # One layer at a time: the adaptive norms together are a twentieth of the model, and are widened to float32.
    layers = [lax.map(modulation, time_weights[name]) for name in ("norm1", "norm2")]
    time_bias = None if config.is_pi05 else linear(time_weights, "action_time_mlp_in", time_embeddings)
    final = modulation(time_weights["norm"])[:, :2]
    return Schedule(jnp.stack(layers, 1).transpose(2, 0, 1, 3, 4), final, time_bias)


def condition(time_weights: Weights, time_embeddings: Array) -> Array:
    """pi0.5's condition of the adaptive norms, (steps, E) float32."""
    inner = jax.nn.silu(linear(time_weights, "time_mlp_in", time_embeddings))
    return jax.nn.silu(linear(time_weights, "time_mlp_out", inner))


def project_qkv(gemma: GemmaConfig, qkv: Array, x: Array, rope: Rope) -> tuple[Array, Array, Array]:
    """(B, T, width) to queries (B, T, N, h), keys and values (B, T, K, h), the first two rotated."""
    heads = dot(x, qkv).reshape(*x.shape[:2], -1, gemma.head_dim)
    rotated = rotate(heads[:, :, : -gemma.num_kv_heads], rope)
    return rotated[:, :, : gemma.num_heads], rotated[:, :, gemma.num_heads :], heads[:, :, -gemma.num_kv_heads :]


def project_kv(gemma: GemmaConfig, qkv: Array, x: Array, rope: Rope) -> tuple[Array, Array]:
    """What `project_qkv` does, without the queries."""
    kv = dot(x, qkv[:, gemma.num_heads * gemma.head_dim :]).reshape(*x.shape[:2], 2, gemma.num_kv_heads, gemma.head_dim)
    return rotate(kv[:, :, 0], rope), kv[:, :, 1]


def mlp(layer: Weights, x: Array) -> Array:
    gate, up = jnp.split(dot(x, layer["gate_up"]), 2, -1)
    return dot(jax.nn.gelu(gate, approximate=True) * up, layer["down"])


def dot(x: Array, matrix: Array, bias: Array | None = None) -> Array:
    """x times a matrix, plus a bias: accumulated in float32, in the dtype of x."""
    # A CPU would widen a bfloat16 matrix first, were the product not float32. A GPU would write that out, and round it
    # in a kernel of its own.
    wide = jnp.float32 if matrix.dtype == jnp.uint16 else None
    product = jnp.matmul(x, numbers(matrix), precision=precision_of(x), preferred_element_type=wide).astype(x.dtype)
    return product if bias is None else product + numbers(bias)


def linear(weights: Weights, name: str, x: Array) -> Array:
    return x @ weights[name] + weights[f"{name}_bias"]


def rms_norm(x: Array, factor: Array, shift: Array | None = None) -> Array:
    """x over its root mean square, times `factor`, plus `shift`; in float32, returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + NORM_EPSILON) * factor
    return (normed if shift is None else normed + shift).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPSILON)
    return (normed * scale + bias).astype(x.dtype)


def rope_table(positions: Array, head_dim: int) -> Rope:
    """Rotation of tokens at `positions` (B, T)."""
    exponents = jnp.arange(head_dim // 2, dtype=jnp.float32) * (2 / head_dim)
    angles = positions[..., None, None] / ROPE_BASE**exponents
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Array, rope: Rope) -> Array:
    """Rotary position embedding of (B, T, heads, h): element i turns with element i + h/2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = [first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin]
    return jnp.concatenate(turned, -1).astype(x.dtype)


def through_layers(
    step: Callable[..., tuple[Array, Any]], x: Array, layers: Layers, *along: Any, count: int | None = None
) -> tuple[Array, Any]:
    """Sends x through layers: of a stack in a loop, of a list one by one, each with instructions of its own.

    Args:
        step: of x, a layer and its share of each of `along`: the next x, and what to keep of the layer.
        x: what goes in.
        layers: the layers.
        along: what layers have beside their weights: a list, arrays with layers on axis 0, or None.
        count: how many layers, from the first; None: all.

    Returns:
        The last x, and what was kept: stacked or in a list, as the layers are.
    """
    # Where this is differentiated no layer's weights are kept for the way back: products are, the rest is done again.
    keep_products = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
    if isinstance(layers, list):
        step, kept = keep_products(step), []
        for i, layer in enumerate(layers[:count]):
            x, of_layer = step(x, layer, *(layer_at(each, i) for each in along))
            kept.append(of_layer)
        return x, kept

    @keep_products
    def indexed_step(x: Array, slices: tuple[Array, Any]) -> tuple[Array, Any]:
        i, shares = slices
        return step(x, layer_at(layers, i), *shares)

    depth = jax.tree.leaves(layers)[0].shape[0]
    return lax.scan(indexed_step, x, (jnp.arange(depth if count is None else count), along))


def layer_at(layers: Any, i: Array | int) -> Any:
    """One layer of a list, or of a stack. Loops index the stack: to scan over a part of it would copy that part."""
    if isinstance(layers, list):
        return layers[i]
    return jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, i, keepdims=False), layers)


def numbers(stored: Array) -> Array:
    """Weights as numbers, of which a CPU holds bfloat16 ones as their bits, in uint16.

    XLA's CPU compiler cannot index bfloat16: it would first widen whole stacks of layers, and the embedding table.
    """
    return lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored
