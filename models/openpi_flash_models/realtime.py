"""Real-time chunking: a new action chunk that continues the one which the robot is still carrying out.

While a chunk is being computed, the robot goes on with the last one; where it then switches, the two must meet. Two
methods make them, and both read the same three numbers of a request: the previous chunk, how many of its steps had been
carried out when the observation was taken (the execution horizon s), and how many more will be before the new chunk is
there (the delay d). Row i of the new chunk then stands for the same moment as row s + i of the previous one.

- `GUIDED` works with every flow model: at each flow step the velocity is corrected towards the previous chunk, firmly
  for the first d steps and less and less up to H - s, where the previous chunk ends. Black, Galliker and Levine,
  "Real-Time Execution of Action Chunking Flow Policies", arXiv 2506.07339. It costs a backward pass for each flow step.
- `TRAINED` needs a model that has seen such delays in training: the first d steps are given as they are, their time set
  to the end of the flow. Black et al., "Training-Time Action Conditioning for Efficient Real-Time Chunking", arXiv
  2512.05964. It costs nothing.
"""

import enum
import math
from typing import NamedTuple

import numpy as np

from openpi_flash_models import flow

MAX_GUIDANCE = 5.0
"""Bound β of the guidance, as the paper recommends; without it the first and last flow steps would overshoot."""


class Method(enum.StrEnum):
    """How a checkpoint's chunks continue others."""

    GUIDED = "guided"
    TRAINED = "trained"


class Continuation(NamedTuple):
    """What a chunk is to continue. Of one request, or of a batch with the batch axis first.

    Attributes:
        actions: (H, action_dim) float32, normalised and padded with zeros: the previous chunk from its step s on, and
            zeros behind its end.
        weights: (H,) float32, how firmly each step is held: of `soft_mask` where guided, of `hard_mask` where trained.
    """

    actions: np.ndarray
    weights: np.ndarray


def soft_mask(horizon: int, delay: int, executed: int) -> np.ndarray:
    """Weights W of arXiv 2506.07339, eq. 5, (horizon,) float32.

    1 for the first `delay` steps, c (e^c - 1) / (e - 1) with c = (H - s - i) / (H - s - d + 1) up to step H - s, and 0
    from there on.

    Args:
        horizon: H, steps of a chunk.
        delay: d, at most H - s.
        executed: s, steps of the previous chunk that had been carried out.
    """
    overlap = horizon - executed
    fading = np.clip((overlap - np.arange(horizon)) / (overlap - delay + 1), 0, 1)
    return np.where(np.arange(horizon) < delay, 1, fading * np.expm1(fading) / (math.e - 1)).astype(np.float32)


def hard_mask(horizon: int, delay: int) -> np.ndarray:
    """1 for the first `delay` steps and 0 for the others, (horizon,) float32."""
    return (np.arange(horizon) < delay).astype(np.float32)


def guidance(num_steps: int) -> np.ndarray:
    """What multiplies the correction at each flow step, (num_steps,) float32.

    arXiv 2506.07339, eqs. 2 and 4: min(β, (1 - τ) / (τ r²)) with r² = (1 - τ)² / (τ² + (1 - τ)²), at τ = 1 - t. The
    paper's time runs from noise at 0 to actions at 1, openpi's from 1 to 0.
    """
    t = flow.timesteps(num_steps).astype(np.float64)
    with np.errstate(divide="ignore"):
        return np.minimum(MAX_GUIDANCE, (t**2 + (1 - t) ** 2) / (t * (1 - t))).astype(np.float32)
