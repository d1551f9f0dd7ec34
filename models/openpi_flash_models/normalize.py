"""Normalisation statistics (`norm_stats.json`) and the maps between a robot's units and the model's."""

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpi_flash_models.errors import CheckpointError

_EPSILON = 1e-6


class Normalization(enum.StrEnum):
    """How a model was trained to see numbers: pi0 with `zscore`, pi0.5 with `quantile`."""

    QUANTILE = "quantile"
    ZSCORE = "zscore"
    NONE = "none"


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of one vector over a training set, each (n,) float64. `q01` and `q99`: 1st and 99th percentile."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Normalizer:
    """Maps one vector between units. Arithmetic in float64, in openpi's order of operations.

    `zscore`: (x - mean) / (std + 1e-6). `quantile`: (x - q01) / (q99 - q01 + 1e-6) * 2 - 1, not clipped.

    Attributes:
        kind: which of the formulas.
        center: (n,) float64, mean or q01.
        scale: (n,) float64, the divisor.
    """

    kind: Normalization
    center: np.ndarray
    scale: np.ndarray

    @classmethod
    def from_stats(cls, stats: NormStats, kind: Normalization) -> "Normalizer":
        """Precomputes the formula.

        Raises:
            ValueError: quantile normalisation without quantiles.
        """
        if kind is Normalization.ZSCORE:
            return cls(kind, stats.mean, stats.std + _EPSILON)
        if stats.q01 is None or stats.q99 is None:
            raise ValueError("quantile normalisation needs q01 and q99")
        return cls(kind, stats.q01, stats.q99 - stats.q01 + _EPSILON)

    @classmethod
    def identity(cls) -> "Normalizer":
        """Leaves values as they are."""
        return cls(Normalization.NONE, np.zeros(0), np.zeros(0))

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """(..., d) in the robot's units, d ≤ n, to (..., d) float64 in the model's."""
        if self.kind is Normalization.NONE:
            return x.astype(np.float64)
        d = x.shape[-1]
        y = (x - self.center[:d]) / self.scale[:d]
        return y * 2.0 - 1.0 if self.kind is Normalization.QUANTILE else y

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """(..., d) in the model's units, d ≥ n, to (..., d) float64 in the robot's.

        Beyond n, quantile normalisation copies and z-score takes mean 0 and std 1, as openpi does.
        """
        n = len(self.center)
        head = x[..., :n]
        out = x.astype(np.float64)
        if self.kind is Normalization.QUANTILE:
            out[..., :n] = (head + 1.0) / 2.0 * self.scale + self.center
        elif self.kind is Normalization.ZSCORE:
            out[..., :n] = head * self.scale + self.center
            out[..., n:] *= 1.0 + _EPSILON
        return out


def load_norm_stats(path: Path) -> dict[str, NormStats]:
    """Reads a `norm_stats.json`: statistics by name, `state` and `actions` among them.

    Raises:
        CheckpointError: the file is malformed; the message names the entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["norm_stats"]
        return {name: _parse_stats(name, entry) for name, entry in entries.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected an object with an object `norm_stats` ({error!r})") from error


def _parse_stats(name: str, entry: Mapping[str, Any]) -> NormStats:
    arrays = {}
    for field in dataclasses.fields(NormStats):
        values = entry.get(field.name)
        if values is None:
            if field.name in {"mean", "std"}:
                raise CheckpointError(f"{name}.{field.name} is missing")
            continue
        try:
            array = np.array(values, np.float64)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{name}.{field.name}: expected a list of numbers ({error})") from error
        if array.ndim != 1 or not np.isfinite(array).all():
            raise CheckpointError(f"{name}.{field.name}: expected a flat list of finite numbers")
        arrays[field.name] = array
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{key} {len(array)}" for key, array in arrays.items())
        raise CheckpointError(f"{name}: lists of one length expected, got {lengths}")
    return NormStats(**arrays)
