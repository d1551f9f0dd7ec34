"""What all Triton kernels share: whether there is Triton, what the GPU can do, and parts of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for this platform: the reference serves
    triton = tl = None

jit: Callable[[Callable[..., Any]], Any] = (lambda function: function) if triton is None else triton.jit


HOPPER = 90
"""Compute capability of H100 and H200."""


OVERLAP_CAPABILITY = 90
"""Of GPUs on which a kernel can begin before the one before it has ended (programmatic dependent launch)."""


def is_for_hopper(x: Tensor) -> bool:
    return x.dtype != torch.float32 and bool(triton.runtime.driver.active.get_current_target().arch == HOPPER)


def overlap(x: Tensor) -> dict[str, bool]:
    """Whether a kernel begins while the one before it ends, and how its launch is told."""
    if x.device.type == "cpu":
        return {"OVERLAP": False}
    target = triton.runtime.driver.active.get_current_target()
    overlaps = target.backend == "cuda" and target.arch >= OVERLAP_CAPABILITY
    return {"OVERLAP": overlaps} | ({"launch_pdl": True} if overlaps else {})


def row_stride(*vectors: Tensor | None) -> int:
    """How far those of one token are from those of the next, alike for all; 0: one vector serves all tokens."""
    (stride,) = {vector.stride(-2) if vector.dim() > 1 else 0 for vector in vectors if vector is not None} or {0}
    return stride


@jit
def wait(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """For the kernels before this one to end. The next one may then begin, to wait likewise."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@jit
def gelu(x):  # type: ignore[no-untyped-def]
    """In its tanh form; tanh(z) = 2·sigmoid(2z) - 1, so that 0.5·(1 + tanh(z)) = sigmoid(2z)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
