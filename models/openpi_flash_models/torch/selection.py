"""Which implementation of the operations a device gets: each the fused one where it gives what the plain one gives."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from openpi_flash_models.config import ModelConfig
from openpi_flash_models.torch import kernels
from openpi_flash_models.torch.kernels import FUSED
from openpi_flash_models.torch.ops import FP8, FP8_MAX, REFERENCE, Ops, rope_table

logger = logging.getLogger(__name__)


def choose(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Ops:
    """The fastest implementation of each operation that works on the device; the log says which are slow, and why."""
    if device.type != "cuda":
        return REFERENCE
    if kernels.triton is None:
        logger.warning("fused kernels are off, inference will be slower: Triton is not installed")
        return REFERENCE
    with torch.cuda.device(device), torch.inference_mode():
        wrong = mismatches(FUSED, config, device, dtype)
    for name, reason in wrong.items():
        logger.warning("fused kernel %s is off, inference will be slower: %s", name, reason)
    if not wrong:
        return FUSED
    return FUSED._replace(name=f"fused, but {', '.join(wrong)}", **{name: getattr(REFERENCE, name) for name in wrong})


def mismatches(ops: Ops, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which operations fail, or differ from the reference by more than rounding, at a model's widths; and how."""
    wrong: dict[str, str] = {}
    for name, arguments in trials(config, device, dtype):
        expected_arguments = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
        expected = getattr(REFERENCE, name)(*expected_arguments)
        try:
            actual = getattr(ops, name)(*arguments)
        except Exception as error:  # no C compiler, a GPU that Triton does not know, too little shared memory, …
            wrong[name] = f"{type(error).__name__}: {error}"
            continue
        # What was written into an argument counts as well.
        results, others = (
            [*_tensors(actual), *_tensors(arguments)],
            [*_tensors(expected), *_tensors(expected_arguments)],
        )
        if not all(_close(one, other) for one, other in zip(results, others, strict=True)):
            wrong[name] = "its numbers are not those of plain PyTorch"
    return wrong


def trials(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, list[Any]]]:
    """A small call of every operation for each width that the model has: its name and arguments."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    gemma = config.vlm
    for width in {config.vlm.width, config.expert.width}:
        x, y = random(2, 3, width), random(2, 3, width)
        gate, factor, shift = (random(width, dtype=torch.float32) for _ in range(3))
        yield "rms_norm", [x, None, None]
        yield "rms_norm", [x, factor, shift]
        yield "add_rms_norm", [x, y, None, None, None]
        yield "add_rms_norm", [x, y, gate, factor, shift]
    vision = config.vision
    x, y = random(2, 3, vision.width), random(2, 3, vision.width)
    factor, shift = (random(vision.width, dtype=torch.float32) for _ in range(2))
    yield "add_layer_norm", [x, y, None, None]
    yield "add_layer_norm", [x, y, factor, shift]
    weight = random(vision.mlp_dim, vision.width) * vision.width**-0.5
    yield "linear_gelu", [x, weight, random(vision.mlp_dim)]
    yield "attend_views", [random(2, 20, 3 * vision.width), vision.num_heads]
    for mlp_dim in {config.vlm.mlp_dim, config.expert.mlp_dim}:
        yield "geglu", [random(2, 3, 2 * mlp_dim)]
    capacity, lengths = 40, torch.tensor([40, 33], dtype=torch.int32, device=device)
    cache = random(2, 2, capacity, gemma.num_kv_heads, gemma.head_dim)
    for tokens, name in ((17, "attend_prefix"), (5, "attend_suffix")):
        qkv = random(2, tokens, (gemma.num_heads + 2 * gemma.num_kv_heads) * gemma.head_dim)
        positions = (lengths[:, None] - tokens).clamp(min=0) + torch.arange(tokens, device=device)
        rope = rope_table(positions, gemma.head_dim)
        yield "rotate_into_cache", [qkv, rope, positions, cache.clone()]
        visible = lengths.clamp(max=tokens) if name == "attend_prefix" else lengths
        yield name, [random(2, tokens, gemma.num_heads, gemma.head_dim), cache, visible]
    # Exact in FP8 but for a power of two in each row: the last bit of a rounding is nobody's promise.
    exact = random(5, config.vlm.width, dtype=torch.float32).to(FP8).float()
    exact[:, 0] = FP8_MAX
    yield "quantise_rows", [(exact * 2.0 ** torch.arange(-2, 3, device=device)[:, None]).to(dtype)]


def _tensors(values: Any) -> list[Tensor]:
    values = (values,) if isinstance(values, Tensor) else values
    return [value for value in values if isinstance(value, Tensor)]


def _close(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    tolerance = {torch.bfloat16: 2e-2, FP8: 0.0}.get(one.dtype, 1e-4)
    return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)
