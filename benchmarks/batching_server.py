"""The action service with the model that BATCHING_MODEL names: `sleep FIXED PER_REQUEST` (ms) or `random` (weights)."""

import os
import sys
import time
from typing import Any

import numpy as np
from openpi_flash_action.__main__ import main
from openpi_flash_models import load
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.policy_configs import PolicyConfig
from openpi_flash_models.request import Backend, ModelBatch


class SleepingBackend:
    """Takes so many milliseconds for a batch, and no processor, as a model on an accelerator would."""

    name = "sleeping"

    def __init__(self, config: ModelConfig, fixed_ms: float, per_request_ms: float) -> None:
        self.config = config
        self._fixed_ms, self._per_request_ms = fixed_ms, per_request_ms

    def sample_actions(self, batch: ModelBatch) -> np.ndarray:
        time.sleep((self._fixed_ms + self._per_request_ms * len(batch.noise)) / 1e3)
        return batch.noise.copy()


def load_backend(config: PolicyConfig, _checkpoint: Any, options: dict[str, Any]) -> Backend:
    kind, *numbers = os.environ["BATCHING_MODEL"].split()
    if kind == "sleep":
        return SleepingBackend(config.model, *map(float, numbers))
    import torch
    from openpi_flash_cli.bench_arm import RandomSource
    from openpi_flash_models.checkpoints.layout import torch_shapes
    from openpi_flash_models.torch import load as load_torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_torch(config.model, RandomSource(torch_shapes(config.model)), **{**options, "device": device})


if __name__ == "__main__":
    load._load_backend = load_backend
    sys.exit(main())
