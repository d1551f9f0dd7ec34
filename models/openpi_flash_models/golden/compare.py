"""What checks share: a measured difference with its tolerance, and a folder of golden data with its backends."""

import dataclasses
import functools
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpi_flash_models.checkpoints.orbax_source import open_jax_source
from openpi_flash_models.checkpoints.safetensors_source import open_torch_source
from openpi_flash_models.checkpoints.source import TensorSource
from openpi_flash_models.config import GemmaConfig, ModelConfig, ModelType, VisionConfig
from openpi_flash_models.request import Backend

BACKENDS = ("torch", "jax")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one quantity was from what it should be.

    Attributes:
        quantity: e.g. `actions_torch`.
        subject: the backend that computed it, or what else did.
        where: file, and row where it has several.
        value: largest absolute difference; infinite where the shapes differ or a number is NaN.
        tolerance: the largest that passes; 0 demands equality.
    """

    quantity: str
    subject: str
    where: str
    value: float
    tolerance: float

    @property
    def passes(self) -> bool:
        return self.value <= self.tolerance


def largest_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference of two arrays; infinite where they cannot be compared."""
    if actual.shape != expected.shape:
        return float("inf")
    if actual.size == 0:
        return 0.0
    value = float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max())
    return value if np.isfinite(value) else float("inf")


class GoldenModel:
    """One model's folder: `config.json`, `model.safetensors`, `checkpoint/params`, and the files with cases."""

    def __init__(self, path: Path, backend_names: Sequence[str] = BACKENDS) -> None:
        self.path = path
        self.backend_names = tuple(backend_names)
        self.description: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.config = model_config(self.description)

    @functools.cached_property
    def backends(self) -> dict[str, Backend]:
        """The backends under test, in float32 on the CPU; each loads the checkpoint in its own format."""
        return {name: self.load(name) for name in self.backend_names}

    def load(self, name: str, precision: str = "float32", **options: Any) -> Backend:
        """One backend, loaded anew."""
        source: TensorSource = (
            open_torch_source(self.path) if name == "torch" else open_jax_source(self.path / "checkpoint")
        )
        try:
            module = importlib.import_module(f"openpi_flash_models.{name}")
            backend: Backend = module.load(self.config, source, device="cpu", precision=precision, **options)
        finally:
            source.close()
        return backend

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.path.glob(pattern))


def model_config(description: dict[str, Any]) -> ModelConfig:
    """Sizes as a golden `config.json` states them."""
    vision = {**description["vision"], **{name: description[name] for name in ("image_size", "patch_size")}}
    sizes = ("vocab_size", "action_dim", "action_horizon", "max_token_len")
    return ModelConfig(
        model_type=ModelType.PI05 if description["pi05"] else ModelType.PI0,
        vision=VisionConfig(**vision),
        vlm=GemmaConfig(**description["paligemma"]),
        expert=GemmaConfig(**description["action_expert"]),
        discrete_state_input=description["pi05"],
        **{name: description[name] for name in sizes},
    )
