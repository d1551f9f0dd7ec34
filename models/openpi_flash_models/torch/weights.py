"""Fills the PyTorch model from a checkpoint: where each stored tensor goes, the copying, and what is folded."""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from openpi_flash_models.checkpoints.layout import (
    TORCH_EMBEDDING,
    TORCH_EXPERT,
    TORCH_PROJECTOR,
    TORCH_VISION,
    TORCH_VLM,
    torch_shapes,
    validate,
)
from openpi_flash_models.checkpoints.source import TensorSource
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.pixels import PIXEL_VALUES
from openpi_flash_models.torch.model import GemmaLayer, Linear, Pi0, VisionTower


class Fold(NamedTuple):
    """A norm whose scale and bias, alike in every request, go into the matrix behind it.

    Attributes:
        scale: name of the stored scale, (in,).
        bias: name of the stored bias, (in,); None: the norm has none, and its scale is stored as an offset from one.
        into: the matrix.
    """

    scale: str
    bias: str | None
    into: Linear


def read_model(config: ModelConfig, source: TensorSource, dtype: torch.dtype, device: str) -> Pi0:
    """Builds a model on `device` and copies the checkpoint into it, tensor by tensor.

    A tensor goes from the mapped file to its place; where its type changes, it does so on the host, one tensor at a
    time, so that the device holds the weights and nothing beside them.
    """
    validate(source, torch_shapes(config))
    with torch.device("meta"):
        model = Pi0(config, dtype, adaptive_dtype(config, source))
    if config.is_pi05:
        timing = model.timing.to_empty(device="cpu")
        del model.timing
    model.to_empty(device=device)
    if config.is_pi05:
        model.timing = timing
    model.vision.pixel_values.copy_(torch.from_numpy(PIXEL_VALUES))
    # The largest first, while little else is in memory beside them.
    for name, slot in sorted(slots(model), key=lambda item: -item[1].numel()):
        slot.copy_(as_tensor(source.read(name)))
        source.release(name)
    for fold in folds(model):
        apply_fold(fold, source)
    return model


def apply_fold(fold: Fold, source: TensorSource) -> None:
    """y = W·(n·s + b) + c is (W·s)·n + (W·b + c), for whatever n is."""
    weight, bias = fold.into.weight, fold.into.bias

    def read(name: str) -> Tensor:
        # The array is a view of a file that is about to be released.
        vector = as_tensor(source.read(name)).to(weight.device, torch.float32, copy=True)
        source.release(name)
        return vector

    if fold.bias is None:
        scale = 1 + read(fold.scale)
    else:
        assert bias is not None  # noqa: S101 - every matrix behind a LayerNorm has one
        scale = read(fold.scale)
        bias.add_(F.linear(read(fold.bias), weight.float()))
    weight.mul_(scale)


def adaptive_dtype(config: ModelConfig, source: TensorSource) -> torch.dtype:
    """How to keep pi0.5's adaptive norms: they are widened when used, so that bfloat16 as stored loses nothing."""
    name = f"{TORCH_EXPERT}norm.dense.weight"
    return torch.bfloat16 if config.is_pi05 and source.dtype(name) == ml_dtypes.bfloat16 else torch.float32


def slots(model: Pi0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that openpi stores, as the part of our parameters that holds it, in the stored shape."""
    yield from vision_slots(model.vision)
    yield TORCH_EMBEDDING, model.embedding
    yield from linear_slots(TORCH_PROJECTOR, model.vision.projector)
    for prefix, layers in ((TORCH_VLM, model.vlm), (TORCH_EXPERT, model.expert)):
        for i, layer in enumerate(layers):
            yield from gemma_slots(f"{prefix}layers.{i}.", layer)
    yield f"{TORCH_VLM}norm.weight", model.vlm_norm
    yield from linear_slots("action_in_proj.", model.action_in_proj)
    yield from linear_slots("action_out_proj.", model.action_out_proj)
    if model.config.is_pi05:
        yield from norm_slots(".dense.weight", model.timing.weight)
        yield from norm_slots(".dense.bias", model.timing.bias)
        yield from linear_slots("time_mlp_in.", model.timing.time_mlp_in)
        yield from linear_slots("time_mlp_out.", model.timing.time_mlp_out)
    else:
        yield f"{TORCH_EXPERT}norm.weight", model.expert_norm
        for name in ("state_proj", "action_time_mlp_in", "action_time_mlp_out"):
            yield from linear_slots(f"{name}.", model.get_submodule(name))


def folds(model: Pi0) -> Iterator[Fold]:
    """Every stored norm that is no parameter of ours."""
    for i, block in enumerate(model.vision.blocks):
        prefix = f"{TORCH_VISION}encoder.layers.{i}.layer_norm"
        yield Fold(f"{prefix}1.weight", f"{prefix}1.bias", block.qkv)
        yield Fold(f"{prefix}2.weight", f"{prefix}2.bias", block.fc1)
    static = [(TORCH_VLM, model.vlm), *([] if model.config.is_pi05 else [(TORCH_EXPERT, model.expert)])]
    for prefix, layers in static:
        for i, layer in enumerate(layers):
            yield Fold(f"{prefix}layers.{i}.input_layernorm.weight", None, layer.qkv)
            yield Fold(f"{prefix}layers.{i}.post_attention_layernorm.weight", None, layer.gate_up)


def vision_slots(vision: VisionTower) -> Iterator[tuple[str, Tensor]]:
    size = vision.config.patch_size
    # Stored as a convolution's (width, 3, size, size); ours multiplies patches of (size, size, 3).
    yield (
        f"{TORCH_VISION}embeddings.patch_embedding.weight",
        vision.patch.weight.unflatten(1, (size, size, 3)).permute(0, 3, 1, 2),
    )
    yield f"{TORCH_VISION}embeddings.patch_embedding.bias", vision.patch.bias
    yield f"{TORCH_VISION}embeddings.position_embedding.weight", vision.position
    for i, block in enumerate(vision.blocks):
        prefix = f"{TORCH_VISION}encoder.layers.{i}."
        for j, projection in enumerate("qkv"):
            yield f"{prefix}self_attn.{projection}_proj.weight", block.qkv.weight.chunk(3)[j]
            yield f"{prefix}self_attn.{projection}_proj.bias", block.qkv.get_parameter("bias").chunk(3)[j]
        yield from linear_slots(f"{prefix}self_attn.out_proj.", block.out)
        yield from linear_slots(f"{prefix}mlp.fc1.", block.fc1)
        yield from linear_slots(f"{prefix}mlp.fc2.", block.fc2)
    yield from linear_slots(f"{TORCH_VISION}post_layernorm.", vision.norm)


def gemma_slots(prefix: str, layer: GemmaLayer) -> Iterator[tuple[str, Tensor]]:
    q, k = layer.config.num_heads * layer.config.head_dim, layer.config.num_kv_heads * layer.config.head_dim
    for name, part in zip("qkv", layer.qkv.weight.split([q, k, k]), strict=True):
        yield f"{prefix}self_attn.{name}_proj.weight", part
    yield f"{prefix}self_attn.o_proj.weight", layer.out.weight
    for name, part in zip(("gate", "up"), layer.gate_up.weight.chunk(2), strict=True):
        yield f"{prefix}mlp.{name}_proj.weight", part
    yield f"{prefix}mlp.down_proj.weight", layer.down.weight


def norm_slots(suffix: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The rows of the action expert's norms: two per layer, then the final one."""
    for i in range(len(stacked) // 2):
        yield f"{TORCH_EXPERT}layers.{i}.input_layernorm{suffix}", stacked[2 * i]
        yield f"{TORCH_EXPERT}layers.{i}.post_attention_layernorm{suffix}", stacked[2 * i + 1]
    yield f"{TORCH_EXPERT}norm{suffix}", stacked[-1]


def linear_slots(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}weight", module.get_parameter("weight")
    yield f"{prefix}bias", module.get_parameter("bias")


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor over the array's memory. PyTorch knows ml_dtypes' bfloat16 only by its bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the array may be read-only; it is only copied from
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
