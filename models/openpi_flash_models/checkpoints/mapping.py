"""Which PyTorch tensors each JAX leaf holds, and how they lie in it."""

from collections.abc import Callable

import numpy as np

from openpi_flash_models.checkpoints import layout as names

View = Callable[[np.ndarray], np.ndarray]
Targets = list[tuple[str, View]]


def _build_rules() -> dict[str, Targets]:
    vision_layer = (
        _under("LayerNorm_0/", "", _layer_norm("layer_norm1"))
        | _under("LayerNorm_1/", "", _layer_norm("layer_norm2"))
        | _under("MlpBlock_0/Dense_0/", "", _linear("mlp.fc1"))
        | _under("MlpBlock_0/Dense_1/", "", _linear("mlp.fc2"))
        | _under("MultiHeadDotProductAttention_0/out/", "", _linear("self_attn.out_proj", _from_heads))
    )
    for jax_name, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        attention = f"MultiHeadDotProductAttention_0/{jax_name}/"
        vision_layer |= _under(attention, "", _linear(f"self_attn.{name}", _to_heads, _flat))
    vision = {
        "embedding/kernel": [("embeddings.patch_embedding.weight", lambda kernel: kernel.transpose(3, 2, 0, 1))],
        "embedding/bias": [("embeddings.patch_embedding.bias", _same)],
        "pos_embedding": [("embeddings.position_embedding.weight", lambda table: table[0])],
    }
    vision |= _under("Transformer/encoder_norm/", "", _layer_norm("post_layernorm"))
    vision |= _under("Transformer/encoderblock/", "encoder.layers.{layer}.", vision_layer)
    rules = _under(names.JAX_VISION, names.TORCH_VISION, vision)
    rules |= _under(names.JAX_VISION + "head/", "", _linear(names.TORCH_PROJECTOR.rstrip(".")))
    rules[names.JAX_EMBEDDING] = [(names.TORCH_EMBEDDING, _same)]

    for suffix, prefix in (("", names.TORCH_VLM), ("_1", names.TORCH_EXPERT)):
        q, k, v = (f"self_attn.{letter}_proj.weight" for letter in "qkv")
        layer: dict[str, Targets] = {
            f"attn/q_einsum{suffix}/w": [(q, _per_head)],
            f"attn/kv_einsum{suffix}/w": [(k, lambda w: _per_head(w[0])), (v, lambda w: _per_head(w[1]))],
            f"attn/qkv_einsum{suffix}/w": [
                (q, lambda w: _per_head(w[0])),
                (k, lambda w: _per_head(w[1])),
                (v, lambda w: _per_head(w[2])),
            ],
            f"attn/attn_vec_einsum{suffix}/w": [("self_attn.o_proj.weight", _from_heads)],
            f"mlp{suffix}/gating_einsum": [
                ("mlp.gate_proj.weight", lambda w: w[0].T),
                ("mlp.up_proj.weight", lambda w: w[1].T),
            ],
            f"mlp{suffix}/linear": [("mlp.down_proj.weight", _transposed)],
        }
        layer |= _under(f"pre_attention_norm{suffix}/", "", _gemma_norm("input_layernorm"))
        layer |= _under(f"pre_ffw_norm{suffix}/", "", _gemma_norm("post_attention_layernorm"))
        rules |= _under(names.JAX_LLM_BLOCKS, prefix + "layers.{layer}.", layer)
        rules |= _under(f"{names.JAX_LLM}final_norm{suffix}/", prefix, _gemma_norm("norm"))
    for head in ("action_in_proj", "action_out_proj", "state_proj", "time_mlp_in", "time_mlp_out"):
        rules |= _under(f"{head}/", "", _linear(head))
    for head in ("action_time_mlp_in", "action_time_mlp_out"):
        rules |= _under(f"{head}/", "", _linear(head))
    return rules


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)


def _transposed(kernel: np.ndarray) -> np.ndarray:
    """(in, out) → (out, in)."""
    return kernel.T


def _to_heads(kernel: np.ndarray) -> np.ndarray:
    """(in, heads, head_dim) → (heads·head_dim, in)."""
    return kernel.reshape(len(kernel), -1).T


def _from_heads(kernel: np.ndarray) -> np.ndarray:
    """(heads, head_dim, out) → (out, heads·head_dim)."""
    return kernel.reshape(-1, kernel.shape[-1]).T


def _per_head(einsum: np.ndarray) -> np.ndarray:
    """(heads, in, head_dim) → (heads·head_dim, in)."""
    return einsum.transpose(0, 2, 1).reshape(-1, einsum.shape[1])


def _linear(name: str, kernel: View = _transposed, bias: View = _same) -> dict[str, Targets]:
    return {"kernel": [(f"{name}.weight", kernel)], "bias": [(f"{name}.bias", bias)]}


def _under(jax_prefix: str, torch_prefix: str, rules: dict[str, Targets]) -> dict[str, Targets]:
    return {
        jax_prefix + leaf: [(torch_prefix + name, view) for name, view in targets] for leaf, targets in rules.items()
    }


def _layer_norm(name: str) -> dict[str, Targets]:
    return {"scale": [(f"{name}.weight", _same)], "bias": [(f"{name}.bias", _same)]}


def _gemma_norm(name: str) -> dict[str, Targets]:
    """Plain (a scale) or adaptive (a dense layer); a checkpoint has one of the two."""
    plain: dict[str, Targets] = {"scale": [(f"{name}.weight", _same)]}
    return plain | _under("Dense_0/", f"{name}.", _linear("dense"))


RULES = _build_rules()
"""Each JAX leaf → the PyTorch tensors that it holds, as (name, view of the leaf). A name with `{layer}` stands for
one tensor per index of the leaf's first axis, and its view is of the leaf at that index."""
