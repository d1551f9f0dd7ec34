"""What one inference costs at least: products to compute, and weights and cached keys to read.

A product of (m, k) and (k, n) is 2·m·k·n operations. Counted are products alone; of bytes, each weight once per pass
over it and each cached key and value once per flow step. What lies between the products is left out, so that a time
computed from this is a bound from below.
"""

from typing import NamedTuple

from openpi_flash_models.config import GemmaConfig, ModelConfig


class Cost(NamedTuple):
    """Operations, and bytes read."""

    flops: int
    num_bytes: int

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The least time on a device of these rates: the longer of computing and reading."""
        return max(self.flops / flops_per_s, self.num_bytes / bytes_per_s)


def action_costs(
    config: ModelConfig, *, batch: int, num_views: int, prompt: int, num_steps: int, weight_bytes: int = 2
) -> dict[str, Cost]:
    """The parts of one call of a policy's model, which run one after the other: `vision`, `prefix`, `flow`.

    Args:
        config: sizes.
        batch: rows of the call.
        num_views: cameras of each row.
        prompt: padded length of the prompt.
        num_steps: flow steps.
        weight_bytes: size of a number of the matrices and the cache.
    """
    prefix = num_views * config.vision.num_tokens + prompt
    horizon, vlm, expert = config.action_horizon, config.vlm, config.expert
    keys = prefix + config.suffix_len
    cached = 2 * expert.depth * expert.num_kv_heads * expert.head_dim * weight_bytes
    kept = 2 * vlm.num_kv_heads * vlm.head_dim * vlm.width
    prefix_weights = (vlm.depth - 1) * layer_weights(vlm) + kept
    prefix_flops = 2 * prefix * prefix_weights + (vlm.depth - 1) * attention_flops(vlm, prefix, prefix)

    heads = 2 * config.action_dim * expert.width + (0 if config.is_pi05 else 2 * expert.width**2)
    step_weights = expert.depth * layer_weights(expert) + heads
    step_flops = 2 * horizon * step_weights + expert.depth * attention_flops(expert, horizon, keys)
    flow = Cost(num_steps * batch * step_flops, num_steps * (step_weights * weight_bytes + batch * keys * cached))
    if not config.is_pi05:  # its state token, once
        state_weights = expert.depth * layer_weights(expert) + config.action_dim * expert.width
        state_flops = 2 * state_weights + expert.depth * attention_flops(expert, 1, keys)
        flow = Cost(flow.flops + batch * state_flops, flow.num_bytes + state_weights * weight_bytes)
    return {
        "vision": vision_cost(config, batch * num_views, weight_bytes),
        "prefix": Cost(batch * prefix_flops, prefix_weights * weight_bytes),
        "flow": flow,
    }


def planner_costs(config: ModelConfig, *, num_views: int, prompt: int, weight_bytes: int = 2) -> dict[str, Cost]:
    """The parts of one subtask: the `first` token, with pictures and prompt, and each `further` one; one row."""
    prefix, vlm = num_views * config.vision.num_tokens + prompt, config.vlm
    weights, table = vlm.depth * layer_weights(vlm), config.vocab_size * vlm.width
    vision = vision_cost(config, num_views, weight_bytes)
    reading = 2 * prefix * weights + vlm.depth * attention_flops(vlm, prefix, prefix)
    cached = 2 * vlm.depth * vlm.num_kv_heads * vlm.head_dim * prefix
    return {
        "first": Cost(vision.flops + reading + 2 * table, vision.num_bytes + (weights + table) * weight_bytes),
        "further": Cost(
            2 * (weights + table) + vlm.depth * attention_flops(vlm, 1, prefix),
            (weights + table + cached) * weight_bytes,
        ),
    }


def vision_cost(config: ModelConfig, images: int, weight_bytes: int) -> Cost:
    """The vision tower over a number of pictures, the projection to the VLM's width included."""
    vision = config.vision
    width, tokens = vision.width, vision.num_tokens
    weights = vision.depth * (4 * width**2 + 2 * width * vision.mlp_dim) + width * config.vlm.width
    weights += 3 * vision.patch_size**2 * width
    flops = tokens * (2 * weights + vision.depth * 4 * tokens * width)
    return Cost(images * flops, weights * weight_bytes if images else 0)


def layer_weights(gemma: GemmaConfig) -> int:
    """Numbers in the matrices of one layer."""
    heads = 2 * (gemma.num_heads + gemma.num_kv_heads) * gemma.head_dim
    return gemma.width * (heads + 3 * gemma.mlp_dim)


def attention_flops(gemma: GemmaConfig, queries: int, keys: int) -> int:
    """Both products of one layer's attention."""
    return 4 * queries * keys * gemma.num_heads * gemma.head_dim
