"""pi0 and pi0.5 in PyTorch, inference only: everything from camera images to an action chunk.

Reads from the top: `Pi0.sample_actions` is the whole computation, and every method below it is one of its parts.
The arithmetic follows SPEC §1. Shapes: B batch, V views, S prefix tokens, n suffix tokens, H action horizon,
A action_dim, D VLM width, E expert width, N query heads, K key/value heads, h head_dim, L layers.

Precision: matrices and activations of the vision tower and the two experts are in the compute dtype; the statistics of
every norm, rotations, softmax, patch and position embedding and what touches actions, state and time are in float32.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from openpi_flash_models import flow
from openpi_flash_models.config import GemmaConfig, ModelConfig, VisionConfig

M = TypeVar("M", bound=nn.Module)

ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-6


class Inputs(NamedTuple):
    """One batch, as `request.ModelBatch` has it, on the device."""

    images: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor
    noise: Tensor


class Schedule(NamedTuple):
    """What a flow step needs and no request changes, for a number of steps. All float32.

    Attributes:
        modulation: (steps, 2L+1, 3, E): for both norms of each expert layer, then the final one, the factor on the
            normed vector, what is added to it, and the gate on the output of the block behind it.
        time_bias: (steps, E): the share of the time embedding in pi0's `action_time_mlp_in`; None in pi0.5.
    """

    modulation: Tensor
    time_bias: Tensor | None


class Cache(NamedTuple):
    """Keys (rotated) and values per layer, each (B, K, capacity, h), the first S of them the prefix's."""

    keys: list[Tensor]
    values: list[Tensor]


class Context(NamedTuple):
    """What the suffix tokens of one batch meet in every flow step.

    Attributes:
        cache: of the prefix, with room for the suffix.
        mask: what each query may attend to, broadcastable to (B, 1, n·N/K, S+n).
        rope: cosine and sine of the suffix tokens' rotation.
        state_token: (B, 1, E) float32 in pi0; None in pi0.5.
    """

    cache: Cache
    mask: Tensor
    rope: tuple[Tensor, Tensor]
    state_token: Tensor | None


class Pi0(nn.Module):
    """A pi0 or pi0.5 model. Build it on the meta device, then `to_empty`, then fill it (weights.py)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, adaptive_dtype: torch.dtype = torch.float32) -> None:
        """Allocates parameters on the current default device.

        Args:
            config: sizes.
            dtype: compute dtype, bfloat16 or float32.
            adaptive_dtype: how pi0.5's adaptive norms are kept. They only serve to compute a schedule, in float32.
        """
        super().__init__()
        self.config = config
        self.dtype = dtype
        width = config.expert.width
        self.vision = VisionTower(config.vision, config.vlm.width, dtype)
        self.embedding = parameter(config.vocab_size, config.vlm.width, dtype=dtype)
        self.vlm: Sequence[GemmaLayer] = modules(GemmaLayer(config.vlm, dtype) for _ in range(config.vlm.depth))
        self.vlm_norms = parameter(2 * config.vlm.depth + 1, config.vlm.width)
        self.expert: Sequence[GemmaLayer] = modules(
            GemmaLayer(config.expert, dtype) for _ in range(config.expert.depth)
        )
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        if config.is_pi05:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
            self.adaptive_weight = parameter(2 * config.expert.depth + 1, 3 * width, width, dtype=adaptive_dtype)
            self.adaptive_bias = parameter(2 * config.expert.depth + 1, 3 * width, dtype=adaptive_dtype)
        else:
            self.state_proj = nn.Linear(config.action_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
            self.expert_norms = parameter(2 * config.expert.depth + 1, width)
        self.requires_grad_(False)

    def sample_actions(self, inputs: Inputs, schedule: Schedule) -> Tensor:
        """Runs the flow from noise to actions, (B, H, A) float32. A compiler sees one graph, flow steps unrolled."""
        context = self.prepare(inputs)
        x = inputs.noise
        num_steps = len(schedule.modulation)
        dt = float(flow.step_size(num_steps))
        for step in range(num_steps):
            x = x + dt * self.velocity(x, step, schedule, context)
        return x

    def prepare(self, inputs: Inputs) -> Context:
        """All of the work that is done once per batch, whatever the number of flow steps."""
        prefix, valid = self.embed_prefix(inputs)
        cache, _ = self.prefix_forward(prefix, valid, room=self.config.suffix_len)
        mask, rope = self.suffix_layout(valid)
        return Context(cache, mask, rope, None if self.config.is_pi05 else self.state_proj(inputs.state)[:, None])

    def embed_prefix(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Prefix tokens (B, S, D) in the compute dtype, cameras then prompt, and which of them are valid (B, S)."""
        prompt = self.embed_prompt(inputs.tokens)
        if inputs.images.shape[1] == 0:
            return prompt, inputs.token_mask
        views = self.vision(inputs.images.flatten(0, 1)).reshape(len(prompt), -1, prompt.shape[-1])
        valid_views = inputs.token_mask.new_ones(views.shape[:2])
        return torch.cat([views, prompt], 1), torch.cat([valid_views, inputs.token_mask], 1)

    def embed_prompt(self, tokens: Tensor) -> Tensor:
        """(B, P) token ids to (B, P, D). Only text is scaled by sqrt(D)."""
        return (F.embedding(tokens, self.embedding).float() * math.sqrt(self.config.vlm.width)).to(self.dtype)

    def prefix_forward(
        self, x: Tensor, valid: Tensor, *, room: int = 0, hidden: bool = False
    ) -> tuple[Cache, Tensor | None]:
        """Runs the VLM over the prefix.

        Args:
            x: (B, S, D) prefix tokens. Padding is on the right, so that positions count up from 0.
            valid: (B, S) bool.
            room: places to leave free in the cache behind the prefix.
            hidden: also compute the final-normed output. The actions do not need it, nor most of the last layer.

        Returns:
            The cache with capacity S + room, and (B, S, D) or None.
        """
        batch, length, _ = x.shape
        gemma = self.config.vlm
        rope = rope_table(torch.arange(length, device=x.device)[None], gemma.head_dim)
        mask = valid[:, None, None, :]
        cache = Cache([], [])
        for i, layer in enumerate(self.vlm):
            whole_layer = hidden or i < gemma.depth - 1
            q, k, v = layer.project(rms_norm(x, 1 + self.vlm_norms[2 * i]), rope, queries=whole_layer)
            shape = (batch, gemma.num_kv_heads, length + room, gemma.head_dim)
            keys, values = k.new_empty(shape), v.new_empty(shape)
            keys[:, :, :length] = k
            values[:, :, :length] = v
            cache.keys.append(keys)
            cache.values.append(values)
            if whole_layer:
                x = x + layer.attend(q, k, v, mask)
                x = x + layer.mlp(rms_norm(x, 1 + self.vlm_norms[2 * i + 1]))
        return cache, rms_norm(x, 1 + self.vlm_norms[-1]) if hidden else None

    def suffix_layout(self, valid: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Mask and rotation of the suffix behind a prefix with validity `valid` (B, S)."""
        length = self.config.suffix_len
        rope = rope_table(
            valid.sum(1)[:, None] + torch.arange(length, device=valid.device), self.config.expert.head_dim
        )
        # Suffix tokens see the valid prefix and each other, except that pi0's state token sees no action.
        mask = F.pad(valid, (0, length), value=True)[:, None, None, :]
        if self.config.is_pi05:
            return mask, rope
        mask = mask.repeat(1, 1, length, 1)
        mask[:, :, 0, valid.shape[1] + 1 :] = False
        # The query heads of a group are rows of one attention (`GemmaLayer.attend`).
        return mask.repeat_interleave(self.config.expert.num_heads // self.config.expert.num_kv_heads, dim=2), rope

    def velocity(self, x: Tensor, step: int, schedule: Schedule, context: Context) -> Tensor:
        """v(x, t) of one flow step, (B, H, A) float32. Overwrites the cache behind the prefix."""
        tokens = self.embed_suffix(x, step, schedule, context)
        return self.action_out_proj(self.suffix_forward(tokens, step, schedule, context)[:, -x.shape[1] :].float())

    def embed_suffix(self, x: Tensor, step: int, schedule: Schedule, context: Context) -> Tensor:
        """Suffix tokens (B, n, E) in the compute dtype."""
        actions = self.action_in_proj(x)
        if schedule.time_bias is None or context.state_token is None:
            return actions.to(self.dtype)
        action_half = self.action_time_mlp_in.weight[:, : actions.shape[-1]]
        actions = self.action_time_mlp_out(F.silu(F.linear(actions, action_half) + schedule.time_bias[step]))
        return torch.cat([context.state_token, actions], 1).to(self.dtype)

    def suffix_forward(self, x: Tensor, step: int, schedule: Schedule, context: Context) -> Tensor:
        """Runs the action expert over the suffix tokens; returns its final-normed output (B, n, E)."""
        modulation = schedule.modulation[step]
        start = context.cache.keys[0].shape[2] - x.shape[1]
        for i, layer in enumerate(self.expert):
            factor, shift, gate = modulation[2 * i]
            q, k, v = layer.project(rms_norm(x, factor, shift), context.rope)
            keys, values = context.cache.keys[i], context.cache.values[i]
            keys[:, :, start:] = k
            values[:, :, start:] = v
            x = (x + layer.attend(q, keys, values, context.mask) * gate).to(x.dtype)
            factor, shift, gate = modulation[2 * i + 1]
            x = (x + layer.mlp(rms_norm(x, factor, shift)) * gate).to(x.dtype)
        factor, shift, _ = modulation[-1]
        return rms_norm(x, factor, shift)

    def schedule(self, time_embeddings: Tensor) -> Schedule:
        """Everything that depends only on the times of the steps.

        Args:
            time_embeddings: (steps, E) float32.
        """
        steps, width = time_embeddings.shape
        if not self.config.is_pi05:
            time_half = self.action_time_mlp_in.weight[:, width:]
            time_bias = F.linear(time_embeddings, time_half, self.action_time_mlp_in.bias)
            scales = 1 + self.expert_norms
            static = torch.stack([scales, torch.zeros_like(scales), torch.ones_like(scales)], 1)
            return Schedule(static.repeat(steps, 1, 1, 1), time_bias)
        condition = self.condition(time_embeddings)
        modulation = time_embeddings.new_empty(steps, len(self.adaptive_weight), 3, width)
        # One norm at a time: together they are a twentieth of the model, and are needed in float32.
        for i, (weight, bias) in enumerate(zip(self.adaptive_weight, self.adaptive_bias, strict=True)):
            modulation[:, i] = F.linear(condition, weight.float(), bias.float()).view(steps, 3, width)
        modulation[:, :, 0] += 1
        return Schedule(modulation, None)

    def condition(self, time_embeddings: Tensor) -> Tensor:
        """pi0.5's condition of the adaptive norms, (steps, E) float32."""
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time_embeddings))))


class VisionTower(nn.Module):
    """SigLIP and the projection to the VLM's width."""

    def __init__(self, config: VisionConfig, out_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.pixel_values = parameter(256)
        self.patch = nn.Linear(config.patch_size**2 * 3, config.width)
        self.position = parameter(config.num_tokens, config.width)
        self.blocks: Sequence[VisionBlock] = modules(VisionBlock(config, dtype) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPSILON)
        self.projector = nn.Linear(config.width, out_width, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """(views, size, size, 3) to (views, tokens, D)."""
        return self.projector(self.encode(self.embed_patches(images)))

    def embed_patches(self, images: Tensor) -> Tensor:
        """Patches in row-major order, projected, plus positions: (views, tokens, width)."""
        if images.dtype == torch.uint8:
            images = self.pixel_values[images.int()]
        size = self.config.patch_size
        views, height, width, _ = images.shape
        patches = images.view(views, height // size, size, width // size, size, 3).transpose(2, 3)
        return (self.patch(patches.reshape(views, -1, size * size * 3)) + self.position).to(self.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """The blocks and the final norm."""
        for block in self.blocks:
            x = block(x)
        return layer_norm(x, self.norm)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPSILON)
        self.qkv = nn.Linear(config.width, 3 * config.width, dtype=dtype)
        self.out = nn.Linear(config.width, config.width, dtype=dtype)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPSILON)
        self.fc1 = nn.Linear(config.width, config.mlp_dim, dtype=dtype)
        self.fc2 = nn.Linear(config.mlp_dim, config.width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(layer_norm(x, self.norm1)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(layer_norm(x, self.norm2)), approximate="tanh"))


class GemmaLayer(nn.Module):
    """The matrices of one layer of an expert. Its norms are the caller's, since only the VLM's are static."""

    def __init__(self, config: GemmaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = nn.Linear(config.width, heads * config.head_dim, bias=False, dtype=dtype)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.width, bias=False, dtype=dtype)
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_dim, bias=False, dtype=dtype)
        self.down = nn.Linear(config.mlp_dim, config.width, bias=False, dtype=dtype)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor], *, queries: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, width) to queries (B, N or 0, T, h), keys and values (B, K, T, h), the first two rotated."""
        head_dim, kv_heads = self.config.head_dim, self.config.num_kv_heads
        num_queries = self.config.num_heads if queries else 0
        weight = self.qkv.weight[-(num_queries + 2 * kv_heads) * head_dim :]
        heads = F.linear(x, weight).unflatten(-1, (-1, head_dim))
        q, k = rotate(heads[:, :, :-kv_heads], rope).transpose(1, 2).split([num_queries, kv_heads], dim=1)
        return q, k, heads[:, :, -kv_heads:].transpose(1, 2)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention of (B, N, T, h) over keys and values (B, K, S, h), and the output projection: (B, T, width)."""
        batch, num_heads, length, head_dim = q.shape
        kv_heads = self.config.num_kv_heads
        # The query heads that share a key head become rows of one attention, so that no key is copied for them.
        rows = q.unflatten(1, (kv_heads, -1)).transpose(2, 3).reshape(batch, kv_heads, -1, head_dim)
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
        heads = attended.view(batch, kv_heads, length, num_heads // kv_heads, head_dim).transpose(1, 2)
        return self.out(heads.reshape(batch, length, num_heads * head_dim))

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate, approximate="tanh") * up)


def rms_norm(x: Tensor, factor: Tensor, shift: Tensor | None = None) -> Tensor:
    """x over its root mean square, times `factor`, plus `shift`; in float32, returned in the dtype of x."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPSILON) * factor
    return (normed if shift is None else normed + shift).to(x.dtype)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return norm(x.float()).to(x.dtype)


def rope_table(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (B, T, 1, h/2) float32, of positions (B, T)."""
    exponents = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device) * (2 / head_dim)
    angles = positions[..., None, None] / ROPE_BASE**exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of (B, T, heads, h): element i turns with element i + h/2."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def modules(items: Iterable[M]) -> Sequence[M]:
    """A module list that keeps its element type."""
    return cast(Sequence[M], nn.ModuleList(items))


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype))
