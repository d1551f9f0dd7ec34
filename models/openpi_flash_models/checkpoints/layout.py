"""Names and shapes of every tensor that a model needs, in both layouts, and the check of a checkpoint against them."""

import logging
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from openpi_flash_models.checkpoints.source import TensorSource
from openpi_flash_models.config import GemmaConfig, ModelConfig
from openpi_flash_models.errors import CheckpointError

logger = logging.getLogger(__name__)

TORCH_ROOT = "paligemma_with_expert."
TORCH_VISION = TORCH_ROOT + "paligemma.model.vision_tower.vision_model."
TORCH_PROJECTOR = TORCH_ROOT + "paligemma.model.multi_modal_projector.linear."
TORCH_VLM = TORCH_ROOT + "paligemma.model.language_model."
TORCH_EXPERT = TORCH_ROOT + "gemma_expert.model."
TORCH_EMBEDDING = TORCH_ROOT + "paligemma.lm_head.weight"

JAX_VISION = "PaliGemma/img/"
JAX_VISION_BLOCKS = JAX_VISION + "Transformer/encoderblock/"
JAX_LLM = "PaliGemma/llm/"
JAX_LLM_BLOCKS = JAX_LLM + "layers/"
JAX_EMBEDDING = JAX_LLM + "embedder/input_embedding"

FLOAT_DTYPES = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
"""Element types that weights may have."""

_MAX_LISTED = 5


def torch_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical tensors of openpi's PyTorch layout; linear weights are (out, in)."""
    vision, vlm, expert = config.vision, config.vlm, config.expert
    shapes: dict[str, tuple[int, ...]] = {
        TORCH_VISION + "embeddings.patch_embedding.weight": (vision.width, 3, vision.patch_size, vision.patch_size),
        TORCH_VISION + "embeddings.patch_embedding.bias": (vision.width,),
        TORCH_VISION + "embeddings.position_embedding.weight": (vision.num_tokens, vision.width),
    }
    for layer in range(vision.depth):
        block = f"{TORCH_VISION}encoder.layers.{layer}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}{norm}.weight": (vision.width,), f"{block}{norm}.bias": (vision.width,)}
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _torch_linear(f"{block}self_attn.{projection}", vision.width, vision.width)
        shapes |= _torch_linear(f"{block}mlp.fc1", vision.width, vision.mlp_dim)
        shapes |= _torch_linear(f"{block}mlp.fc2", vision.mlp_dim, vision.width)
    shapes |= {TORCH_VISION + f"post_layernorm.{leaf}": (vision.width,) for leaf in ("weight", "bias")}
    shapes |= _torch_linear(TORCH_PROJECTOR.rstrip("."), vision.width, vlm.width)
    shapes[TORCH_EMBEDDING] = (config.vocab_size, vlm.width)
    shapes |= _torch_gemma(TORCH_VLM, vlm, adaptive=False)
    shapes |= _torch_gemma(TORCH_EXPERT, expert, adaptive=config.is_pi05)
    for name, (width_in, width_out) in _heads(config).items():
        shapes |= _torch_linear(name, width_in, width_out)
    return shapes


def jax_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical leaves of openpi's JAX layout; layers are stacked on axis 0 and kernels are (in, out)."""
    vision, vlm = config.vision, config.vlm
    depth, width, heads = vision.depth, vision.width, vision.num_heads
    head_dim = width // heads
    attention = JAX_VISION_BLOCKS + "MultiHeadDotProductAttention_0/"
    shapes: dict[str, tuple[int, ...]] = {
        JAX_VISION + "embedding/kernel": (vision.patch_size, vision.patch_size, 3, width),
        JAX_VISION + "embedding/bias": (width,),
        JAX_VISION + "pos_embedding": (1, vision.num_tokens, width),
        attention + "out/kernel": (depth, heads, head_dim, width),
        attention + "out/bias": (depth, width),
        JAX_VISION_BLOCKS + "MlpBlock_0/Dense_0/kernel": (depth, width, vision.mlp_dim),
        JAX_VISION_BLOCKS + "MlpBlock_0/Dense_0/bias": (depth, vision.mlp_dim),
        JAX_VISION_BLOCKS + "MlpBlock_0/Dense_1/kernel": (depth, vision.mlp_dim, width),
        JAX_VISION_BLOCKS + "MlpBlock_0/Dense_1/bias": (depth, width),
        JAX_VISION + "head/kernel": (width, vlm.width),
        JAX_VISION + "head/bias": (vlm.width,),
        JAX_EMBEDDING: (config.vocab_size, vlm.width),
    }
    for leaf in ("scale", "bias"):
        shapes[JAX_VISION + f"Transformer/encoder_norm/{leaf}"] = (width,)
        shapes |= {JAX_VISION_BLOCKS + f"LayerNorm_{i}/{leaf}": (depth, width) for i in (0, 1)}
    for projection in ("query", "key", "value"):
        shapes[attention + projection + "/kernel"] = (depth, width, heads, head_dim)
        shapes[attention + projection + "/bias"] = (depth, heads, head_dim)
    shapes |= _jax_gemma(vlm, suffix="", adaptive=False)
    shapes |= _jax_gemma(config.expert, suffix="_1", adaptive=config.is_pi05)
    for name, (width_in, width_out) in _heads(config).items():
        shapes |= {f"{name}/kernel": (width_in, width_out), f"{name}/bias": (width_out,)}
    return shapes


def validate(source: TensorSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that `source` holds every expected tensor in its expected shape, as floats; reads no data.

    Tensors that nobody expects are named in a warning.

    Raises:
        CheckpointError: names the first missing or misshaped tensors, counts the rest, and says so when the
            checkpoint looks like the other model type or another size.
    """
    found = {name: source.shape(name) for name in source.names()}
    problems = [f"{name}: missing (expected shape {shape})" for name, shape in expected.items() if name not in found]
    present = [(name, shape) for name, shape in expected.items() if name in found]
    problems += [f"{name}: shape {found[name]}, expected {shape}" for name, shape in present if found[name] != shape]
    problems += [
        f"{name}: element type {source.dtype(name)}, expected a float"
        for name, _ in present
        if source.dtype(name) not in FLOAT_DTYPES
    ]
    if problems:
        rest = len(problems) - _MAX_LISTED
        lines = [*problems[:_MAX_LISTED], *([f"and {rest} more"] if rest > 0 else []), *_hints(found, expected)]
        raise CheckpointError("the checkpoint does not fit the model configuration:\n  " + "\n  ".join(lines))
    if extra := [name for name in found if name not in expected]:
        listed = ", ".join(extra[:_MAX_LISTED]) + (", …" if len(extra) > _MAX_LISTED else "")
        logger.warning("the checkpoint has %d tensors that the model does not use: %s", len(extra), listed)


def _heads(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The linear layers around the expert: name to (in, out)."""
    action_dim, width = config.action_dim, config.expert.width
    ends = {"action_in_proj": (action_dim, width), "action_out_proj": (width, action_dim)}
    if config.is_pi05:
        return ends | {"time_mlp_in": (width, width), "time_mlp_out": (width, width)}
    mlp = {"action_time_mlp_in": (2 * width, width), "action_time_mlp_out": (width, width)}
    return ends | {"state_proj": (action_dim, width)} | mlp


def _torch_linear(name: str, width_in: int, width_out: int) -> dict[str, tuple[int, ...]]:
    return {name + ".weight": (width_out, width_in), name + ".bias": (width_out,)}


def _torch_gemma(prefix: str, gemma: GemmaConfig, *, adaptive: bool) -> dict[str, tuple[int, ...]]:
    query_dim, kv_dim = gemma.num_heads * gemma.head_dim, gemma.num_kv_heads * gemma.head_dim

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        if adaptive:
            return _torch_linear(name + ".dense", gemma.width, 3 * gemma.width)
        return {name + ".weight": (gemma.width,)}

    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(gemma.depth):
        block = f"{prefix}layers.{layer}."
        shapes |= {
            block + "self_attn.q_proj.weight": (query_dim, gemma.width),
            block + "self_attn.k_proj.weight": (kv_dim, gemma.width),
            block + "self_attn.v_proj.weight": (kv_dim, gemma.width),
            block + "self_attn.o_proj.weight": (gemma.width, query_dim),
            block + "mlp.gate_proj.weight": (gemma.mlp_dim, gemma.width),
            block + "mlp.up_proj.weight": (gemma.mlp_dim, gemma.width),
            block + "mlp.down_proj.weight": (gemma.width, gemma.mlp_dim),
        }
        shapes |= norm(block + "input_layernorm") | norm(block + "post_attention_layernorm")
    return shapes | norm(prefix + "norm")


def _jax_gemma(gemma: GemmaConfig, *, suffix: str, adaptive: bool) -> dict[str, tuple[int, ...]]:
    depth, width, heads, head_dim = gemma.depth, gemma.width, gemma.num_heads, gemma.head_dim
    attention = JAX_LLM_BLOCKS + "attn/"
    shapes: dict[str, tuple[int, ...]] = {
        f"{attention}attn_vec_einsum{suffix}/w": (depth, heads, head_dim, width),
        f"{JAX_LLM_BLOCKS}mlp{suffix}/gating_einsum": (depth, 2, width, gemma.mlp_dim),
        f"{JAX_LLM_BLOCKS}mlp{suffix}/linear": (depth, gemma.mlp_dim, width),
    }
    if gemma.num_kv_heads == heads:
        shapes[f"{attention}qkv_einsum{suffix}/w"] = (depth, 3, heads, width, head_dim)
    else:
        shapes[f"{attention}q_einsum{suffix}/w"] = (depth, heads, width, head_dim)
        shapes[f"{attention}kv_einsum{suffix}/w"] = (depth, 2, gemma.num_kv_heads, width, head_dim)
    norms = {
        f"{JAX_LLM_BLOCKS}pre_attention_norm{suffix}": (depth,),
        f"{JAX_LLM_BLOCKS}pre_ffw_norm{suffix}": (depth,),
        f"{JAX_LLM}final_norm{suffix}": (),
    }
    for norm, stacked in norms.items():
        if adaptive:
            shapes[norm + "/Dense_0/kernel"] = (*stacked, width, 3 * width)
            shapes[norm + "/Dense_0/bias"] = (*stacked, 3 * width)
        else:
            shapes[norm + "/scale"] = (*stacked, width)
    return shapes


def _hints(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What a wrong checkpoint looks like, judged by the tensors that only one model type or size has."""
    if not found:
        yield "hint: it holds no tensors of a pi0 or pi0.5 model"
        return
    marks = {"pi0": ("state_proj.bias", "state_proj/bias"), "pi0.5": ("time_mlp_in.bias", "time_mlp_in/bias")}
    looks, wanted = (
        {model for model, names in marks.items() if any(name in tensors for name in names)}
        for tensors in (found, expected)
    )
    if len(looks) == 1 and looks != wanted:
        yield f"hint: it looks like a {looks.pop()} checkpoint, and the configuration is for {wanted.pop()}"
    sizes = {
        "vocabulary": (0, TORCH_EMBEDDING, JAX_EMBEDDING),
        "VLM width": (1, TORCH_EMBEDDING, JAX_EMBEDDING),
        "expert width": (0, "action_in_proj.bias", "action_in_proj/bias"),
        "action_dim": (0, "action_out_proj.bias", "action_out_proj/bias"),
    }
    for what, (axis, *names) in sizes.items():
        for name in names:
            if name in found and name in expected and len(found[name]) > axis:
                size, expected_size = found[name][axis], expected[name][axis]
                if size != expected_size:
                    yield f"hint: its {what} is {size}, and the configuration's is {expected_size}"
