"""Which implementation of the operations a device gets: each the fused one where it gives what the plain one gives."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from openpi_flash_models.config import GemmaConfig, ModelConfig
from openpi_flash_models.torch.fused import FUSED
from openpi_flash_models.torch.launch import triton
from openpi_flash_models.torch.ops import FP8, FP8_MAX, REFERENCE, Norm, Ops, Span, Stream, rope_table

logger = logging.getLogger(__name__)


EXPERT_OPS = ("stream", "embed", "read", "norm_qkv", "norm_geglu", "project_add")
"""What one of these makes another takes: all are fused, or none."""

Call = Callable[[Ops], Any]
"""A call of an operation: the tensors that it gave or wrote to."""


def choose(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Ops:
    """The fastest implementation of each operation that works on the device; the log says which are slow, and why."""
    if device.type != "cuda":
        return REFERENCE
    if triton is None:
        logger.warning("fused kernels are off, inference will be slower: Triton is not installed")
        return REFERENCE
    with torch.cuda.device(device), torch.inference_mode():
        wrong = mismatches(FUSED, config, device, dtype)
    for name, reason in wrong.items():
        logger.warning("fused kernel %s is off, inference will be slower: %s", name, reason)
    if not wrong:
        return FUSED
    off = {name for found in wrong for name in (EXPERT_OPS if found in EXPERT_OPS else (found,))}
    return FUSED._replace(name=f"fused, but {', '.join(wrong)}", **{name: getattr(REFERENCE, name) for name in off})


def mismatches(ops: Ops, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which operations fail, or differ from the reference by more than rounding, at a model's widths; and how."""
    wrong: dict[str, str] = {}
    for name, call in trials(config, device, dtype):
        expected = _tensors(call(REFERENCE))
        try:
            actual = _tensors(call(ops))
        except Exception as error:  # no C compiler, a GPU that Triton does not know, too little shared memory, …
            wrong[name] = f"{type(error).__name__}: {error}"
            continue
        if not all(_close(one, other) for one, other in zip(actual, expected, strict=True)):
            wrong[name] = "its numbers are not those of plain PyTorch"
    return wrong


def trials(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """The name of every operation and a small call of it, for each width that the model has."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def trial(name: str, *arguments: Any) -> tuple[str, Call]:
        return name, lambda ops: getattr(ops, name)(*arguments)

    for width in {config.vlm.width, config.expert.width}:
        x, y = random(2, 3, width), random(2, 3, width)
        gate, factor, shift = (random(width, dtype=torch.float32) for _ in range(3))
        yield trial("rms_norm", x, None, None)
        yield trial("rms_norm", x, factor, shift)
        yield trial("add_rms_norm", x, y, None, None, None)
        yield trial("add_rms_norm", x, y, gate, factor, shift)
    vision = config.vision
    x, y = random(2, 3, vision.width), random(2, 3, vision.width)
    factor, shift = (random(vision.width, dtype=torch.float32) for _ in range(2))
    yield trial("add_layer_norm", x, y, None, None)
    yield trial("add_layer_norm", x, y, factor, shift)
    weight = random(vision.mlp_dim, vision.width) * vision.width**-0.5
    yield trial("linear_gelu", x, weight, random(vision.mlp_dim))
    for mlp_dim in {config.vlm.mlp_dim, config.expert.mlp_dim}:
        yield trial("geglu", random(2, 3, 2 * mlp_dim))
    gemma, lengths = config.vlm, torch.tensor([40, 33], dtype=torch.int32, device=device)
    cache = random(2, 2, 40, gemma.num_kv_heads, gemma.head_dim)
    for tokens, name in ((17, "attend_prefix"), (5, "attend_suffix")):
        span = _span(lengths, tokens, gemma.head_dim)
        qkv = random(2, tokens, (gemma.num_heads + 2 * gemma.num_kv_heads) * gemma.head_dim)
        yield "rotate_into_cache", _writes("rotate_into_cache", qkv, span.rope, span.positions, cache)
        visible = lengths.clamp(max=tokens) if name == "attend_prefix" else lengths
        yield trial(name, random(2, tokens, gemma.num_heads, gemma.head_dim), cache, visible)
    # Exact in FP8 but for a power of two in each row: the last bit of a rounding is nobody's promise.
    exact = random(5, config.vlm.width, dtype=torch.float32).to(FP8).float()
    exact[:, 0] = FP8_MAX
    yield trial("quantise_rows", (exact * 2.0 ** torch.arange(-2, 3, device=device)[:, None]).to(dtype))
    yield from expert_trials(config.expert, random, cache, lengths)


def expert_trials(
    gemma: GemmaConfig, random: Callable[..., Tensor], cache: Tensor, lengths: Tensor
) -> Iterator[tuple[str, Call]]:
    """Those of what an expert's layer is made of, with norms that do something and with others that do not."""
    tokens, width, heads_width = 5, gemma.width, gemma.num_heads * gemma.head_dim
    x, attended, inner = (random(2, tokens, size) for size in (width, heads_width, gemma.mlp_dim))

    def matrix(size_out: int, size_in: int) -> Tensor:
        return random(size_out, size_in) * size_in**-0.5

    qkv, gate_up = matrix(heads_width + 2 * cache[0, 0, 0].numel(), width), matrix(2 * gemma.mlp_dim, width)
    span = _span(lengths, tokens, gemma.head_dim)
    out, down = matrix(width, heads_width), matrix(width, gemma.mlp_dim)
    num_actions = 32

    def wide(*shape: int) -> Tensor:
        return random(*shape, dtype=torch.float32)

    actions = (wide(2, tokens, num_actions), wide(width, num_actions) * num_actions**-0.5, wide(width))
    reading = (wide(num_actions, width) * width**-0.5, wide(num_actions))
    shared, own = ([wide(*shape, width) for _ in range(3)] for shape in ((), (2, tokens)))
    for norm in (Norm(), Norm(*shared), Norm(*own)):

        def before(weight: Tensor, norm: Norm = norm) -> Norm:
            return norm if norm.shift is None else norm._replace(product=F.linear(norm.shift, weight.float()))

        def stream(ops: Ops, norm: Norm = norm) -> Stream:
            return ops.stream(x, norm)

        def embed(ops: Ops, norm: Norm = norm) -> Stream:
            return ops.embed(*actions, norm, x.dtype)

        def read(ops: Ops, norm: Norm = norm, stream: Call = stream) -> Tensor:
            return ops.read(stream(ops), norm, *reading).to(x.dtype)

        def project(y: Tensor, weight: Tensor, norm: Norm = norm, stream: Call = stream) -> Call:
            def call(ops: Ops) -> tuple[Tensor, Tensor]:
                added = ops.project_add(y, weight, stream(ops), norm.gate, norm)
                return added.x, ops.norm_geglu(added, before(gate_up, norm), gate_up)

            return call

        yield "rms_norm", functools.partial(lambda norm, ops: ops.rms_norm(x, norm.factor, norm.shift), norm)
        yield "norm_geglu", lambda ops: ops.norm_geglu(stream(ops), before(gate_up), gate_up)
        yield "norm_qkv", lambda ops: _writes("norm_qkv", stream(ops), before(qkv), qkv, span, cache)(ops)
        yield "embed", lambda ops: ops.norm_geglu(embed(ops), before(gate_up), gate_up)
        yield "read", read
        yield "project_add", project(attended, out)
        yield "project_add", project(inner, down)


def _span(lengths: Tensor, tokens: int, head_dim: int) -> Span:
    """That of the last of so many tokens."""
    positions = (lengths[:, None] - tokens).clamp(min=0) + torch.arange(tokens, device=lengths.device)
    return Span(positions, lengths, rope_table(positions, head_dim))


def _writes(name: str, *arguments: Any) -> Call:
    """A call that writes to a cache, its last argument, of which it gets a copy."""

    def call(ops: Ops) -> tuple[Tensor, Tensor]:
        *others, cache = arguments
        written = cache.clone()
        return getattr(ops, name)(*others, written), written

    return call


def _tensors(values: Any) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by rounding alone; that of bfloat16 is of the size of what is added up."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype != torch.bfloat16:
        tolerance = 0.0 if one.dtype == FP8 else 1e-4
        return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)
    difference, expected = one.float() - other.float(), other.float()
    return bool((difference.norm() <= 1e-2 * expected.norm()) & (difference.abs().max() <= 5e-2 * expected.abs().max()))
