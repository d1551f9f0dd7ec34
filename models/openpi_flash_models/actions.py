"""Delta and absolute actions: some models act relative to the state in which the chunk begins."""

from collections.abc import Sequence

import numpy as np


def make_mask(dims: Sequence[int]) -> np.ndarray:
    """Expands a compact mask: n > 0 means n times true, n < 0 means -n times false; (2, -1) is [T, T, F]."""
    return np.repeat([n > 0 for n in dims], [abs(n) for n in dims])


def to_absolute(actions: np.ndarray, state: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Adds the state to the masked dimensions of every step of a chunk.

    Args:
        actions: (..., horizon, d) in the robot's units.
        state: (..., s), the state that the chunk was computed from.
        mask: (m,) bool, m ≤ min(d, s); true where actions are relative.

    Returns:
        (..., horizon, d), a new array.
    """
    out = actions.copy()
    out[..., : len(mask)] += _offset(state, mask)
    return out


def to_delta(actions: np.ndarray, state: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The inverse of `to_absolute`: what a model that acts in deltas was trained on."""
    out = actions.copy()
    out[..., : len(mask)] -= _offset(state, mask)
    return out


def _offset(state: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, state[..., : len(mask)], 0)[..., np.newaxis, :]
