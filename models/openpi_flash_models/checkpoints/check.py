"""Checks that a checkpoint and its conversion give the same actions, by running both backends."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from openpi_flash_models.checkpoints.detect import Checkpoint, Layout, detect
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.request import Backend, ModelBatch

MAX_DIFFERENCE = 2e-5
"""Largest difference of actions between the backends, in float32, from weights that lost nothing."""

MIN_COSINE = 0.999
"""Least cosine between actions where the conversion rounded the weights."""


@dataclasses.dataclass(frozen=True)
class ActionsCheck:
    """How far the actions of two checkpoints are apart, for one random input, both computed in float32.

    Attributes:
        max_difference: largest absolute difference; actions are of order 1.
        cosine: of the two action chunks.
        exact: the converted weights lost nothing, so `max_difference` counts; otherwise `cosine` does.
    """

    max_difference: float
    cosine: float
    exact: bool

    @property
    def passed(self) -> bool:
        return self.max_difference <= MAX_DIFFERENCE if self.exact else self.cosine >= MIN_COSINE


def check_same_actions(jax_dir: Path, torch_dir: Path, config: ModelConfig, *, seed: int = 0) -> ActionsCheck:
    """Runs the JAX backend on one checkpoint and the PyTorch one on the other, on the CPU, one after the other.

    Needs both frameworks, and memory for the model in float32. Raises CheckpointError as `convert` does.
    """
    from openpi_flash_models.jax.backend import load as load_jax
    from openpi_flash_models.torch.backend import load as load_torch

    batch = random_batch(config, seed)
    jax_checkpoint, torch_checkpoint = detect(jax_dir, layout=Layout.JAX), detect(torch_dir, layout=Layout.TORCH)
    expected = _sample(load_jax, jax_checkpoint, config, batch)
    actual = _sample(load_torch, torch_checkpoint, config, batch)
    cosine = np.vdot(actual, expected) / (np.linalg.norm(actual) * np.linalg.norm(expected))
    exact = all(np.can_cast(old, new) for old in _dtypes(jax_checkpoint) for new in _dtypes(torch_checkpoint))
    return ActionsCheck(float(np.abs(actual - expected).max()), float(cosine), exact)


def random_batch(config: ModelConfig, seed: int) -> ModelBatch:
    """One request with two cameras of noise and the shortest prompt."""
    rng = np.random.default_rng(seed)
    size = config.vision.image_size
    num_tokens = config.prompt_buckets[0]
    return ModelBatch(
        images=rng.integers(0, 256, (1, 2, size, size, 3), np.uint8),
        tokens=rng.integers(0, config.vocab_size, (1, num_tokens), np.int32),
        token_mask=np.arange(num_tokens)[None] < num_tokens - 3,
        state=rng.uniform(-1, 1, (1, config.action_dim)).astype(np.float32),
        noise=rng.standard_normal((1, config.action_horizon, config.action_dim), np.float32),
        num_steps=10,
    )


def _sample(load: Callable[..., Backend], checkpoint: Checkpoint, config: ModelConfig, batch: ModelBatch) -> np.ndarray:
    source = checkpoint.open()
    actions = load(config, source, device="cpu", precision="float32").sample_actions(batch)
    source.close()
    return actions.astype(np.float64)


def _dtypes(checkpoint: Checkpoint) -> set[np.dtype]:
    source = checkpoint.open()
    found = {source.dtype(name) for name in source.names()}
    source.close()
    return found
