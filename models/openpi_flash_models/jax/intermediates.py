"""What the JAX model computes on the way to the actions, under the names that `golden.cases` compares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from openpi_flash_models import flow
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.jax import model
from openpi_flash_models.jax.backend import JaxBackend
from openpi_flash_models.request import ModelBatch


def intermediates(backend: JaxBackend, batch: ModelBatch, time_embeddings: np.ndarray) -> dict[str, np.ndarray]:
    """Runs the model piece by piece, with given time embeddings (steps, E), and keeps what each piece returned.

    Shapes are those of model.py; the views of a batch stay apart (B, V, …), caches are (L, B, S, K, h).
    """
    embeddings = jax.device_put(time_embeddings, backend.device)
    with jax.default_matmul_precision("highest"):
        found = _trace(backend.config, backend.weights, backend.time_weights, backend.upload(batch), embeddings)
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


@functools.partial(jax.jit, static_argnames="config")
def _trace(
    config: ModelConfig, weights: model.Weights, time_weights: model.Weights, inputs: model.Inputs, embeddings: Array
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    batch_size, num_views = inputs.images.shape[:2]
    if num_views:
        tower = weights["vision"]
        stem = model.embed_patches(config, tower, inputs.images.reshape(-1, *inputs.images.shape[2:]))
        vision = {"stem_posemb": stem, "block0": model.vision_block(config, model.layer_at(tower["blocks"], 0), stem)}
        vision["encoded"] = model.encode_patches(config, tower, stem)
        vision["projected"] = model.project(tower, vision["encoded"])
        found |= {f"vit_{name}": x.reshape(batch_size, num_views, *x.shape[1:]) for name, x in vision.items()}
    prefix = (inputs.images, inputs.tokens, inputs.token_mask)
    found["prefix_embeds"], valid = model.embed_prefix(config, weights, *prefix)
    caches, x = model.prefix_forward(config, weights, found["prefix_embeds"], valid)
    out = model.prefix_output(config, weights, x, jnp.arange(x.shape[1])[None], caches=caches, valid=valid)
    if isinstance(caches, list):
        caches = jax.tree.map(lambda *layers: jnp.stack(layers), *caches)
    found |= {"prefix_out": out, "prefix_k": caches.keys, "prefix_v": caches.values}

    schedule, context = model.make_schedule(config, time_weights, embeddings), model.prepare(config, weights, inputs)
    if config.is_pi05:
        cond = model.condition(time_weights, embeddings[:1])
        found["adarms_cond_t1"] = jnp.broadcast_to(cond, (batch_size, cond.shape[-1]))
    first = jax.tree.map(lambda rows: rows[0], schedule)
    found["suffix_embeds_t1"] = model.embed_suffix(weights, inputs.noise, first, context)
    found["suffix_out_t1"] = model.suffix_forward(config, weights, found["suffix_embeds_t1"], first, context)

    def flow_step(x: Array, step: model.Schedule) -> tuple[Array, tuple[Array, Array]]:
        v = model.velocity(config, weights, x, step, context)
        x = x + flow.step_size(len(embeddings)) * v
        return x, (x, v)

    _, (x, v) = jax.lax.scan(flow_step, inputs.noise, schedule)
    x = jnp.concatenate([inputs.noise[None], x])
    return found | {"v_t1": v[0], "x_trajectory": x.swapaxes(0, 1), "v_trajectory": v.swapaxes(0, 1)}
