"""pi0 and pi0.5 in PyTorch, inference only: everything from camera images to an action chunk.

Reads from the top: `Pi0.sample_actions` is the whole computation, and every method below it is one of its parts. What
lies between matrix products, and in the expert the products too, is in ops.py. The arithmetic follows SPEC §1. Shapes:
B batch, V views, S prefix tokens, T any tokens, H action horizon, A action_dim, D VLM width, E expert width, N query
heads, K key/value heads, h head_dim, L layers.

The cache of a layer is (2, B, C, K, h): keys (rotated), then values. A row's valid prefix lies at its start, and
everything later follows without a gap, over what padding wrote: which keys a token may see is a length, never a mask.

Precision: matrices and activations of the vision tower and the two experts are in the compute dtype; the statistics of
every norm, rotations, softmax, patch and position embedding and what touches actions, state and time are in float32.
Scale and bias of a norm that every request shares are in the matrix behind it (weights.py folds them at load).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from openpi_flash_models import flow
from openpi_flash_models.config import GemmaConfig, ModelConfig, VisionConfig
from openpi_flash_models.torch.ops import NORM_EPSILON, REFERENCE, Norm, Ops, Span, Stream, rope_table

M = TypeVar("M", bound=nn.Module)

Cache = list[Tensor]
"""Keys and values of each layer, (2, B, C, K, h)."""


class Inputs(NamedTuple):
    """One batch, as `request.ModelBatch` has it, on the device. The last two: its continuation."""

    images: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor
    noise: Tensor
    previous: Tensor | None = None
    weights: Tensor | None = None


class Step(NamedTuple):
    """What one flow step needs and no request changes. All float32.

    Attributes:
        modulation: (2L+1, 3, E), factor, shift and gate of the expert's norms: two per layer, then the final one; None
            in pi0.
        time_bias: (E,), the share of the time embedding in pi0's `action_time_mlp_in`; None in pi0.5.
        products: (L, (N+2K)·h + 2M), what the shifts add to the outputs of `qkv` and `gate_up`; None in pi0, and where
            tokens differ in their norms.
    """

    modulation: Tensor | None = None
    time_bias: Tensor | None = None
    products: Tensor | None = None


Schedule = list[Step]


class Context(NamedTuple):
    """What the action tokens of one batch meet in every flow step."""

    cache: Cache
    span: Span


class Pi0(nn.Module):
    """A pi0 or pi0.5 model. Build it on the meta device, then `to_empty`, then fill it (weights.py).

    Attributes:
        ops: the operations between the products. A compiler wants `REFERENCE`.
        timing: pi0.5's way from the time to its norms. It stays on the CPU: of a schedule that is computed once for
            each number of steps, the device needs the result alone.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, adaptive_dtype: torch.dtype = torch.float32) -> None:
        """Allocates parameters on the current default device.

        Args:
            config: sizes.
            dtype: compute dtype, bfloat16 or float32.
            adaptive_dtype: how pi0.5's adaptive norms are kept.
        """
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.ops: Ops = REFERENCE
        width = config.expert.width
        self.vision = VisionTower(config.vision, config.vlm.width, dtype)
        self.embedding = parameter(config.vocab_size, config.vlm.width, dtype=dtype)
        self.vlm: Sequence[GemmaLayer] = modules(GemmaLayer(config.vlm, dtype) for _ in range(config.vlm.depth))
        self.vlm_norm = parameter(config.vlm.width)
        self.expert: Sequence[GemmaLayer] = modules(
            GemmaLayer(config.expert, dtype) for _ in range(config.expert.depth)
        )
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        if config.is_pi05:
            self.timing = Timing(width, 2 * config.expert.depth + 1, adaptive_dtype)
        else:
            self.state_proj = nn.Linear(config.action_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
            self.expert_norm = parameter(width)
        self.requires_grad_(False)

    def sample_actions(self, inputs: Inputs, schedule: Schedule) -> Tensor:
        """Runs the flow from noise to actions, (B, H, A) float32."""
        return integrate(self.prepare, self.velocity, inputs, schedule)

    def prepare(self, inputs: Inputs) -> Context:
        """All of the work that is done once per batch, whatever the number of flow steps."""
        prefix, valid = self.embed_prefix(inputs)
        cache, _ = self.prefix_forward(prefix, valid, room=self.config.suffix_len)
        lengths = valid.sum(1, dtype=torch.int32)
        if not self.config.is_pi05:
            # pi0's state token sees no action, and nothing of it depends on the time: its keys and values are the same
            # in every step.
            norms = self.expert_norms(Step())
            state = self.ops.stream(self.embed_state(inputs.state), norms[0])
            self.run_expert(state, norms, Context(cache, self.suffix_span(lengths, 1)))
            lengths = lengths + 1
        return Context(cache, self.suffix_span(lengths, self.config.action_horizon))

    def embed_prefix(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Prefix tokens (B, S, D) in the compute dtype, cameras then prompt, and which of them are valid (B, S)."""
        prompt = self.embed_prompt(inputs.tokens)
        if inputs.images.shape[1] == 0:
            return prompt, inputs.token_mask
        views = self.vision(inputs.images.flatten(0, 1), self.ops).reshape(len(prompt), -1, prompt.shape[-1])
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
        ops, gemma = self.ops, self.config.vlm
        positions = torch.arange(length, device=x.device)[None]
        span = Span(positions, valid.sum(1, dtype=torch.int32), rope_table(positions, gemma.head_dim))
        shape = (2, batch, length + room, gemma.num_kv_heads, gemma.head_dim)
        # Zeros, since attention multiplies what it must not see by 0.
        cache = [x.new_zeros(shape) for _ in self.vlm]
        normed = ops.rms_norm(x, None, None)
        for layer, own in zip(self.vlm, cache, strict=True):
            if own is cache[-1] and not hidden:
                layer.keep(normed, span, own, ops)
                return cache, None
            x, normed = ops.add_rms_norm(x, layer.attend(normed, span, own, ops, ops.attend_prefix), None, None, None)
            factor = 1 + self.vlm_norm if own is cache[-1] else None
            x, normed = ops.add_rms_norm(x, layer.mlp(normed, ops), None, factor, None)
        return cache, normed

    def suffix_span(self, lengths: Tensor, num_tokens: int) -> Span:
        """The span of `num_tokens` tokens behind `lengths` (B,) others, which see these and each other."""
        positions = lengths[:, None] + torch.arange(num_tokens, device=lengths.device)
        return Span(positions, lengths + num_tokens, rope_table(positions, self.config.expert.head_dim))

    def velocity(self, x: Tensor, step: Step, context: Context) -> Tensor:
        """v(x, t) of one flow step, (B, H, A) float32. Overwrites the cache behind what comes before the actions."""
        norms = self.expert_norms(step)
        stream = self.run_expert(self.embed_actions(x, step, norms[0]), norms, context)
        return self.ops.read(stream, norms[-1], self.action_out_proj.weight, self.action_out_proj.bias)

    def embed_state(self, state: Tensor) -> Tensor:
        """pi0's state token, (B, 1, E) in the compute dtype."""
        return self.state_proj(state)[:, None].to(self.dtype)

    def embed_actions(self, x: Tensor, step: Step, norm: Norm) -> Stream:
        """Action tokens (B, H, E) in the compute dtype, on their way to the first norm."""
        if step.time_bias is None:
            return self.ops.embed(x, self.action_in_proj.weight, self.action_in_proj.bias, norm, self.dtype)
        actions = self.action_in_proj(x)
        action_half = self.action_time_mlp_in.weight[:, : actions.shape[-1]]
        actions = self.action_time_mlp_out(F.silu(F.linear(actions, action_half) + step.time_bias))
        return self.ops.stream(actions.to(self.dtype), norm)

    def suffix_forward(self, stream: Stream, norms: list[Norm], context: Context) -> Tensor:
        """Runs the action expert over tokens behind the prefix; returns its final-normed output, (B, T, E)."""
        return self.ops.rms_norm(self.run_expert(stream, norms, context).x, norms[-1].factor, norms[-1].shift)

    def run_expert(self, stream: Stream, norms: list[Norm], context: Context) -> Stream:
        """All layers of the action expert."""
        ops, span = self.ops, context.span
        for i, (layer, own) in enumerate(zip(self.expert, context.cache, strict=True)):
            norm, next_norm, norm_behind = norms[2 * i : 2 * i + 3]
            q = ops.norm_qkv(stream, norm, layer.qkv.weight, span, own)
            attended = ops.attend_suffix(q, own, span.lengths).flatten(2)
            stream = ops.project_add(attended, layer.out.weight, stream, norm.gate, next_norm)
            inner = ops.norm_geglu(stream, next_norm, layer.gate_up.weight)
            stream = ops.project_add(inner, layer.down.weight, stream, next_norm.gate, norm_behind)
        return stream

    def expert_norms(self, step: Step) -> list[Norm]:
        """The norms of the expert in their order. pi0's are folded into the matrices behind them, but for the last."""
        if step.modulation is None:
            return [Norm()] * (2 * len(self.expert)) + [Norm(1 + self.expert_norm)]
        norms = [Norm(*norm.unbind()) for norm in step.modulation.unbind()]
        if step.products is not None:
            parts = [part for row in step.products.unbind() for part in row.split(self._product_sizes, -1)]
            norms[:-1] = [norm._replace(product=part) for norm, part in zip(norms[:-1], parts, strict=True)]
        return norms

    @property
    def _product_sizes(self) -> list[int]:
        return [len(matrix.weight) for matrix in (self.expert[0].qkv, self.expert[0].gate_up)]

    def schedule(self, time_embeddings: Tensor) -> Schedule:
        """Everything that depends only on the times of the steps, on the model's device.

        Args:
            time_embeddings: (steps, E) float32, on the CPU.
        """
        device = self.embedding.device
        if self.config.is_pi05:
            modulation = self.timing(time_embeddings).to(device)
            return list(map(Step, modulation, itertools.repeat(None), self.products(modulation)))
        time_half = self.action_time_mlp_in.weight[:, time_embeddings.shape[1] :]
        time_bias = F.linear(time_embeddings.to(device), time_half, self.action_time_mlp_in.bias)
        return [Step(time_bias=bias) for bias in time_bias]

    def products(self, modulation: Tensor) -> Tensor:
        """(steps, 2L+1, 3, E) to the products of each step, (steps, L, (N+2K)·h + 2M) float32."""
        shifts = modulation[:, :-1, 1].unflatten(1, (-1, 2))
        of_layers = []
        for i, layer in enumerate(self.expert):
            both = zip(shifts[:, i].unbind(1), (layer.qkv, layer.gate_up), strict=True)
            of_layers.append(torch.cat([F.linear(shift, matrix.weight.float()) for shift, matrix in both], 1))
        return torch.stack(of_layers, 1)


def integrate(
    prepare: Callable[[Inputs], Context],
    velocity: Callable[[Tensor, Step, Context], Tensor],
    inputs: Inputs,
    schedule: Schedule,
) -> Tensor:
    """The flow from noise to actions with a model's two halves, as they are or compiled: (B, H, A) float32."""
    context = prepare(inputs)
    x, dt = inputs.noise, float(flow.step_size(len(schedule)))
    for step in schedule:
        x = torch.add(x, velocity(x, step, context), alpha=dt)
    return x


def make_schedule(model: Pi0, num_steps: int) -> Schedule:
    """A model's schedule for a number of flow steps."""
    embedding = flow.time_embedding(flow.timesteps(num_steps), model.config.expert.width)
    return model.schedule(torch.from_numpy(embedding))


class Timing(nn.Module):
    """pi0.5's time MLP and the matrices of its adaptive norms."""

    def __init__(self, width: int, num_norms: int, adaptive_dtype: torch.dtype) -> None:
        super().__init__()
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        self.weight = parameter(num_norms, 3 * width, width, dtype=adaptive_dtype)
        self.bias = parameter(num_norms, 3 * width, dtype=adaptive_dtype)

    def forward(self, time_embeddings: Tensor) -> Tensor:
        """(steps, E) to the norms of each step, (steps, 2L+1, 3, E) float32."""
        condition = self.condition(time_embeddings)
        modulation = time_embeddings.new_empty(len(condition), len(self.weight), 3, condition.shape[1])
        # One norm at a time: together they are a twentieth of the model, and are needed in float32.
        for i, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            modulation[:, i] = F.linear(condition, weight.float(), bias.float()).view(len(condition), 3, -1)
        modulation[:, :, 0] += 1
        return modulation

    def condition(self, time_embeddings: Tensor) -> Tensor:
        """The condition of the adaptive norms, (steps, E) float32."""
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
        self.projector = Linear(config.width, out_width, bias=True, dtype=dtype)

    def forward(self, images: Tensor, ops: Ops) -> Tensor:
        """(views, size, size, 3) to (views, tokens, D)."""
        return self.projector(self.encode(self.embed_patches(images), ops), ops)

    def embed_patches(self, images: Tensor) -> Tensor:
        """Patches in row-major order, projected, plus positions: (views, tokens, width)."""
        if images.dtype == torch.uint8:
            images = self.pixel_values[images.long()]
        size = self.config.patch_size
        views, height, width, _ = images.shape
        patches = images.view(views, height // size, size, width // size, size, 3).transpose(2, 3)
        return (self.patch(patches.reshape(views, -1, size * size * 3)) + self.position).to(self.dtype)

    def encode(self, x: Tensor, ops: Ops) -> Tensor:
        """The blocks and the final norm."""
        normed = standardise(x)
        for block in self.blocks:
            scale, bias = (self.norm.weight, self.norm.bias) if block is self.blocks[-1] else (None, None)
            x, normed = block(x, normed, ops, scale, bias)
        return normed


class VisionBlock(nn.Module):
    """One block of SigLIP. Scales and biases of its norms are in the matrices behind them."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.width, 3 * config.width, bias=True, dtype=dtype)
        self.out = Linear(config.width, config.width, bias=True, dtype=dtype)
        self.fc1 = Linear(config.width, config.mlp_dim, bias=True, dtype=dtype)
        self.fc2 = Linear(config.mlp_dim, config.width, bias=True, dtype=dtype)

    def forward(
        self, x: Tensor, normed: Tensor, ops: Ops, scale: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(views, tokens, width) tokens and their norm to those behind the block, whose norm has a scale and a bias."""
        x, normed = ops.add_layer_norm(x, self.attend(normed, ops), None, None)
        return ops.add_layer_norm(x, self.mlp(normed, ops), scale, bias)

    def attend(self, x: Tensor, ops: Ops) -> Tensor:
        q, k, v = self.qkv(x, ops).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # All tokens see all: PyTorch's own choice, cuDNN's attention or FlashAttention on a GPU, needs no lengths.
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), ops)

    def mlp(self, x: Tensor, ops: Ops) -> Tensor:
        return self.fc2(self.fc1.gelu(x, ops), ops)


class GemmaLayer(nn.Module):
    """The matrices of one layer of an expert. Its norms are the caller's."""

    def __init__(self, config: GemmaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(config.width, heads * config.head_dim, bias=False, dtype=dtype)
        self.out = Linear(config.num_heads * config.head_dim, config.width, bias=False, dtype=dtype)
        self.gate_up = Linear(config.width, 2 * config.mlp_dim, bias=False, dtype=dtype)
        self.down = Linear(config.mlp_dim, config.width, bias=False, dtype=dtype)

    def attend(
        self, x: Tensor, span: Span, cache: Tensor, ops: Ops, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Puts keys and values of (B, T, width) normed tokens into the cache; their attention, projected."""
        q = ops.rotate_into_cache(self.qkv(x, ops), span.rope, span.positions, cache)
        return self.out(attend(q, cache, span.lengths).flatten(2), ops)

    def keep(self, x: Tensor, span: Span, cache: Tensor, ops: Ops) -> None:
        """Puts keys and values of (B, T, width) normed tokens into the cache, and does nothing else."""
        keys_values = self.qkv(x, ops, last=2 * self.config.num_kv_heads * self.config.head_dim)
        ops.rotate_into_cache(keys_values, span.rope, span.positions, cache)

    def mlp(self, x: Tensor, ops: Ops) -> Tensor:
        return self.down(ops.geglu(self.gate_up(x, ops)), ops)


class Linear(nn.Module):
    """A matrix in the compute dtype, or in FP8 once `quantise` was called."""

    def __init__(self, in_width: int, out_width: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(out_width, in_width, dtype=dtype)
        self.bias = parameter(out_width, dtype=dtype) if bias else None
        self.scale: Tensor | None = None

    def forward(self, x: Tensor, ops: Ops, *, last: int = 0) -> Tensor:
        """(…, in) to (…, out), or to the `last` of these only."""
        weight, bias, scale = self.weight[-last:], self.bias, self.scale
        if scale is None:
            return F.linear(x, weight, bias)
        quantised, row_scale = ops.quantise_rows(x.flatten(0, -2))
        product = torch._scaled_mm(
            quantised, weight.t(), row_scale, scale[-last:].t(), bias, out_dtype=x.dtype, use_fast_accum=x.is_cuda
        )
        return product.view(*x.shape[:-1], -1)

    def gelu(self, x: Tensor, ops: Ops) -> Tensor:
        """(…, in) to GELU of (…, out)."""
        if self.scale is not None or self.bias is None:
            return F.gelu(self(x, ops), approximate="tanh")
        return ops.linear_gelu(x, self.weight, self.bias)

    def quantise(self) -> None:
        """Keeps the matrix in FP8, with one float32 scale (out, 1) for each row: half the memory, twice the rate."""
        quantised, self.scale = REFERENCE.quantise_rows(self.weight)
        self.weight = nn.Parameter(quantised, requires_grad=False)


def standardise(x: Tensor) -> Tensor:
    """LayerNorm without scale and bias; statistics in float32."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON)


def modules(items: Iterable[M]) -> Sequence[M]:
    """A module list that keeps its element type."""
    return cast(Sequence[M], nn.ModuleList(items))


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
