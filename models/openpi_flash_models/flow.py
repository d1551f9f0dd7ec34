"""The flow's clock: the times at which the velocity is evaluated, and their embedding. Both backends share it.

The shortest period of the embedding amplifies a time by 1571, so that its rounding shows in the actions. openpi
accumulates the time in float32 (SPEC §1.6); so do we, and embed it in float64 as openpi's PyTorch does.
"""

import numpy as np

DEFAULT_NUM_STEPS = 10
MIN_PERIOD = 4e-3
MAX_PERIOD = 4.0


def step_size(num_steps: int) -> np.float32:
    """What a step adds to the time, and what multiplies the velocity: negative, from noise at 1 to actions at 0."""
    return np.float32(-1.0 / num_steps)


def timesteps(num_steps: int) -> np.ndarray:
    """Times of the flow steps, (num_steps,) float32: 1, then each the rounded sum of its predecessor and the step."""
    dt = step_size(num_steps)
    # A cumulative sum in float32 is the same sequence of roundings as adding step after step.
    return np.cumsum(np.array([1.0, *[dt] * (num_steps - 1)], np.float32), dtype=np.float32)


def time_embedding(times: np.ndarray, width: int) -> np.ndarray:
    """Sines, then cosines, of each time at width/2 periods spaced evenly in logarithm.

    Args:
        times: (n,) float32.
        width: an even number, the width of the action expert.

    Returns:
        (n, width) float32, computed in float64.
    """
    periods = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** np.linspace(0.0, 1.0, width // 2)
    angles = 2 * np.pi * times.astype(np.float64)[:, None] / periods
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
