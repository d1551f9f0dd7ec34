"""Reads a checkpoint into the JAX model's weights: the name and shape of each array, and the leaves it is packed from.

Matrices that multiply the same input lie side by side: queries, keys and values in `qkv`, gate and up in `gate_up`.
Layers of one kind are a stack on a CPU, and a list everywhere else. Through a stack goes a loop, compiled once whatever
its length, but XLA may copy each layer out of the stack before multiplying by it, and records no loop in a CUDA graph.
Through a list goes straight-line code, which reads each matrix where it is and can be recorded.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from openpi_flash_models.checkpoints.layout import (
    JAX_EMBEDDING,
    JAX_LLM,
    JAX_LLM_BLOCKS,
    JAX_VISION,
    JAX_VISION_BLOCKS,
    jax_shapes,
    validate,
)
from openpi_flash_models.checkpoints.source import TensorSource
from openpi_flash_models.config import GemmaConfig, ModelConfig
from openpi_flash_models.jax.model import Weights

FLOAT32 = np.dtype(np.float32)


class Slot(NamedTuple):
    """One array of the model.

    Attributes:
        path: its place in the nested dicts.
        shape: its shape.
        leaves: the stored leaves that it is packed from.
        pack: writes the leaves, in order, into an array of `shape`.
        dtype: what it is kept in; None for the compute dtype.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    leaves: tuple[str, ...]
    pack: Callable[..., None]
    dtype: np.dtype | None = None


LAYERS = (("vision", "blocks"), ("vlm_layers",), ("expert_layers",))
"""Where layers of one kind are; their slots have them on axis 0."""

VLM = frozenset({"vision", "embedding", "vlm_layers", "vlm_norm"})
"""Parts of the model that read pictures and text: all that is needed to write text."""


def read_weights(
    config: ModelConfig,
    source: TensorSource,
    dtype: np.dtype,
    device: jax.Device,
    *,
    parts: Collection[str] | None = None,
    stacked: bool | None = None,
) -> Weights:
    """Reads, packs and moves the model to `device`, array by array, converting where the stored type differs.

    What is in the `time` dict stays in host memory.

    Args:
        config: sizes, to which the whole checkpoint must fit.
        source: leaves under openpi's JAX paths.
        dtype: the compute dtype.
        device: where to.
        parts: top-level names to read; None: all. Leaves of the others are not read.
        stacked: whether layers are stacks, and not lists; None: on a CPU.
    """
    validate(source, jax_shapes(config))
    weights: Weights = {}
    if stacked is None:
        stacked = device.platform == "cpu"
    wanted = [slot for slot in slots(config, adaptive_dtype(config, source)) if parts is None or slot.path[0] in parts]
    # The largest first, while little else is in memory beside them.
    for slot in sorted(wanted, key=lambda slot: -np.prod(slot.shape)):
        packed: Any = np.empty(slot.shape, slot.dtype or dtype)
        slot.pack(packed, *map(source.read, slot.leaves))
        for leaf in slot.leaves:
            source.release(leaf)
        if device.platform == "cpu" and packed.dtype == ml_dtypes.bfloat16:
            packed = packed.view(np.uint16)  # `model.numbers` says why
        *group, name = slot.path
        if slot.path[0] == "time":
            place(weights, slot.path, packed)
        elif stacked or tuple(group) not in LAYERS:
            place(weights, slot.path, jax.device_put(packed, device).block_until_ready())
        else:
            apart = jax.block_until_ready(jax.device_put(list(packed), device))
            for layer, array in zip(layers_of(weights, group, len(packed)), apart, strict=True):
                layer[name] = array
    return weights


def abstract_weights(config: ModelConfig, dtype: np.dtype, *, stacked: bool = True) -> Weights:
    """Shapes and dtypes of all weights, as `jax.eval_shape` takes them."""
    weights: Weights = {}
    for slot in slots(config, dtype):
        *group, name = slot.path
        if stacked or tuple(group) not in LAYERS:
            place(weights, slot.path, jax.ShapeDtypeStruct(slot.shape, slot.dtype or dtype))
        else:
            for layer in layers_of(weights, group, slot.shape[0]):
                layer[name] = jax.ShapeDtypeStruct(slot.shape[1:], slot.dtype or dtype)
    return weights


def adaptive_dtype(config: ModelConfig, source: TensorSource) -> np.dtype:
    """How to keep pi0.5's adaptive norms: they are widened when used, so that bfloat16 as stored loses nothing."""
    kept = np.dtype(ml_dtypes.bfloat16)
    return kept if config.is_pi05 and source.dtype(f"{JAX_LLM}final_norm_1/Dense_0/kernel") == kept else FLOAT32


def slots(config: ModelConfig, adaptive_dtype: np.dtype) -> Iterator[Slot]:
    """Every array of the model. What is in no `time` dict is what `sample_actions` takes."""
    vlm, expert = config.vlm, config.expert
    yield from vision_slots(config)
    yield Slot(("embedding",), (config.vocab_size, vlm.width), (JAX_EMBEDDING,), copy)
    yield from gemma_slots("vlm_layers", vlm, "")
    for name, stored in (("norm1", "pre_attention_norm"), ("norm2", "pre_ffw_norm")):
        yield Slot(("vlm_layers", name), (vlm.depth, vlm.width), (f"{JAX_LLM_BLOCKS}{stored}/scale",), copy, FLOAT32)
    yield Slot(("vlm_norm",), (vlm.width,), (f"{JAX_LLM}final_norm/scale",), copy, FLOAT32)
    yield from gemma_slots("expert_layers", expert, "_1")
    norms = {
        "norm1": ((expert.depth,), f"{JAX_LLM_BLOCKS}pre_attention_norm_1/"),
        "norm2": ((expert.depth,), f"{JAX_LLM_BLOCKS}pre_ffw_norm_1/"),
        "norm": ((), f"{JAX_LLM}final_norm_1/"),
    }
    for name, (stacked, stored) in norms.items():
        if config.is_pi05:
            kernel, bias = (*stacked, expert.width, 3 * expert.width), (*stacked, 3 * expert.width)
            yield Slot(("time", name, "kernel"), kernel, (f"{stored}Dense_0/kernel",), copy, adaptive_dtype)
            yield Slot(("time", name, "bias"), bias, (f"{stored}Dense_0/bias",), copy, adaptive_dtype)
        else:
            yield Slot(("time", name, "scale"), (*stacked, expert.width), (f"{stored}scale",), copy, FLOAT32)
    yield from linear_slots((), "action_in_proj", config.action_dim, expert.width)
    yield from linear_slots((), "action_out_proj", expert.width, config.action_dim)
    if config.is_pi05:
        yield from linear_slots(("time",), "time_mlp_in", expert.width, expert.width)
        yield from linear_slots(("time",), "time_mlp_out", expert.width, expert.width)
    else:
        yield from linear_slots((), "state_proj", config.action_dim, expert.width)
        yield from linear_slots((), "action_time_mlp_out", expert.width, expert.width)
        # The first rows multiply the action, the others the time, which no request changes.
        name, square = "action_time_mlp_in", (expert.width, expert.width)
        yield Slot((name,), square, (f"{name}/kernel",), pack_rows(slice(None, expert.width)), FLOAT32)
        yield Slot(("time", name), square, (f"{name}/kernel",), pack_rows(slice(expert.width, None)), FLOAT32)
        yield Slot(("time", f"{name}_bias"), (expert.width,), (f"{name}/bias",), copy, FLOAT32)


def vision_slots(config: ModelConfig) -> Iterator[Slot]:
    vision, out_width = config.vision, config.vlm.width
    depth, width, patch = vision.depth, vision.width, vision.patch_size**2 * 3
    attention, mlp = f"{JAX_VISION_BLOCKS}MultiHeadDotProductAttention_0/", f"{JAX_VISION_BLOCKS}MlpBlock_0/"
    float32 = {
        "patch": ((patch, width), "embedding/kernel"),
        "patch_bias": ((width,), "embedding/bias"),
        "position": ((vision.num_tokens, width), "pos_embedding"),
        "norm_scale": ((width,), "Transformer/encoder_norm/scale"),
        "norm_bias": ((width,), "Transformer/encoder_norm/bias"),
    }
    for name, (shape, leaf) in float32.items():
        yield Slot(("vision", name), shape, (JAX_VISION + leaf,), copy, FLOAT32)
    yield Slot(("vision", "projector"), (width, out_width), (f"{JAX_VISION}head/kernel",), copy)
    yield Slot(("vision", "projector_bias"), (out_width,), (f"{JAX_VISION}head/bias",), copy)
    for i in (1, 2):
        for kind in ("scale", "bias"):
            leaf = f"{JAX_VISION_BLOCKS}LayerNorm_{i - 1}/{kind}"
            yield Slot(("vision", "blocks", f"norm{i}_{kind}"), (depth, width), (leaf,), copy, FLOAT32)
    for kind, name, shape in (("kernel", "qkv", (depth, width, 3 * width)), ("bias", "qkv_bias", (depth, 3 * width))):
        leaves = tuple(f"{attention}{projection}/{kind}" for projection in ("query", "key", "value"))
        yield Slot(("vision", "blocks", name), shape, leaves, pack_side_by_side)
    compute = {
        "out": ((depth, width, width), f"{attention}out/kernel"),
        "out_bias": ((depth, width), f"{attention}out/bias"),
        "fc1": ((depth, width, vision.mlp_dim), f"{mlp}Dense_0/kernel"),
        "fc1_bias": ((depth, vision.mlp_dim), f"{mlp}Dense_0/bias"),
        "fc2": ((depth, vision.mlp_dim, width), f"{mlp}Dense_1/kernel"),
        "fc2_bias": ((depth, width), f"{mlp}Dense_1/bias"),
    }
    for name, (shape, leaf) in compute.items():
        yield Slot(("vision", "blocks", name), shape, (leaf,), copy)


def gemma_slots(group: str, gemma: GemmaConfig, suffix: str) -> Iterator[Slot]:
    attention, mlp = f"{JAX_LLM_BLOCKS}attn/", f"{JAX_LLM_BLOCKS}mlp{suffix}/"
    depth, width, queries = gemma.depth, gemma.width, gemma.num_heads * gemma.head_dim
    qkv = (depth, width, queries + 2 * gemma.num_kv_heads * gemma.head_dim)
    if gemma.num_kv_heads == gemma.num_heads:
        yield Slot((group, "qkv"), qkv, (f"{attention}qkv_einsum{suffix}/w",), pack_heads)
    else:
        leaves = (f"{attention}q_einsum{suffix}/w", f"{attention}kv_einsum{suffix}/w")
        yield Slot((group, "qkv"), qkv, leaves, pack_heads)
    yield Slot((group, "out"), (depth, queries, width), (f"{attention}attn_vec_einsum{suffix}/w",), copy)
    yield Slot((group, "gate_up"), (depth, width, 2 * gemma.mlp_dim), (f"{mlp}gating_einsum",), pack_gate_up)
    yield Slot((group, "down"), (depth, gemma.mlp_dim, width), (f"{mlp}linear",), copy)


def linear_slots(group: tuple[str, ...], name: str, width_in: int, width_out: int) -> Iterator[Slot]:
    yield Slot((*group, name), (width_in, width_out), (f"{name}/kernel",), copy, FLOAT32)
    yield Slot((*group, f"{name}_bias"), (width_out,), (f"{name}/bias",), copy, FLOAT32)


def copy(packed: np.ndarray, leaf: np.ndarray) -> None:
    """The leaf as it is, with some of its axes merged."""
    packed.reshape(leaf.shape)[...] = leaf


def pack_rows(rows: slice) -> Callable[..., None]:
    def pack(packed: np.ndarray, leaf: np.ndarray) -> None:
        packed[...] = leaf[rows]

    return pack


def pack_side_by_side(packed: np.ndarray, *leaves: np.ndarray) -> None:
    """Leaves (..., heads, head_dim) one behind the other on the last axis."""
    axis = leaves[0].ndim - 2
    parts = packed.reshape(*leaves[0].shape[:axis], len(leaves), *leaves[0].shape[axis:])
    for i, leaf in enumerate(leaves):
        parts[..., i, :, :] = leaf


def pack_heads(packed: np.ndarray, *leaves: np.ndarray) -> None:
    """Leaves ([L], [c], heads, D, h) into (L, D, all heads · h), in order."""
    *_, width, head_dim = leaves[0].shape
    heads = packed.reshape(len(packed), width, -1, head_dim)
    start = 0
    for leaf in leaves:
        merged = leaf.reshape(len(packed), -1, width, head_dim)
        heads[:, :, start : start + merged.shape[1]] = merged.transpose(0, 2, 1, 3)
        start += merged.shape[1]


def pack_gate_up(packed: np.ndarray, leaf: np.ndarray) -> None:
    """(L, 2, D, mlp) into (L, D, 2 · mlp)."""
    depth, _, width, mlp_dim = leaf.shape
    packed.reshape(depth, width, 2, mlp_dim)[...] = leaf.transpose(0, 2, 1, 3)


def layers_of(weights: Weights, group: Sequence[str], depth: int) -> list[Weights]:
    """The list of layers at `group`, made if need be."""
    for name in group[:-1]:
        weights = weights.setdefault(name, {})
    layers: list[Weights] = weights.setdefault(group[-1], [{} for _ in range(depth)])
    return layers


def place(weights: Weights, path: tuple[str, ...], array: Any) -> None:
    for name in path[:-1]:
        weights = weights.setdefault(name, {})
    weights[path[-1]] = array
