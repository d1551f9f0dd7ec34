"""Loads, compiles and runs the JAX model."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from openpi_flash_models import flow
from openpi_flash_models.checkpoints.source import TensorSource
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.jax import model
from openpi_flash_models.jax.compilation import Options, keep_programs
from openpi_flash_models.jax.weights import read_weights
from openpi_flash_models.realtime import Method
from openpi_flash_models.request import ModelBatch

PRECISIONS = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}

KEPT_SCHEDULES = 8
"""Numbers of steps whose schedules are kept; a schedule of a full-size model is a few MB."""


def load(
    config: ModelConfig,
    source: TensorSource,
    *,
    device: str | None = None,
    precision: str = "bfloat16",
    num_steps: int = flow.DEFAULT_NUM_STEPS,
    compilation_cache: Path | None = None,
    data_home: Path | None = None,
) -> "JaxBackend":
    """Builds a model from a checkpoint. Host memory never holds more than the weights and, briefly, one leaf twice.

    Args:
        config: sizes; the checkpoint must fit them.
        source: leaves under openpi's JAX paths.
        device: a JAX platform, e.g. `cuda` or `cpu`; JAX's own choice when None.
        precision: `bfloat16` (mixed, see model.py) or `float32`.
        num_steps: the number of flow steps to prepare for. Others are prepared when first asked for.
        compilation_cache: where compiled programs are kept; None: see `keep_programs`.
        data_home: the same.

    Raises:
        CheckpointError: a leaf is missing or misshaped.
        PolicyConfigError: an unknown precision, a device that is not there, or a cache that cannot be written to.
    """
    chosen, dtype = parse_placement(device, precision)
    keep_programs(chosen, compilation_cache, data_home)
    weights = read_weights(config, source, dtype, chosen)
    return JaxBackend(config, weights, chosen, num_steps=num_steps)


def parse_placement(device: str | None, precision: str) -> tuple[jax.Device, np.dtype]:
    """The device and the compute dtype of these names; raises PolicyConfigError where there are none."""
    if precision not in PRECISIONS:
        raise PolicyConfigError(f"precision: {precision!r} is unknown; expected one of {', '.join(PRECISIONS)}")
    try:
        return jax.devices(device)[0], np.dtype(PRECISIONS[precision])
    except RuntimeError as error:
        raise PolicyConfigError(f"device: {device!r} is none that JAX can use here: {error}") from error


class JaxBackend:
    """A loaded JAX model on one device. Each shape compiles at its first call. Not thread-safe.

    Attributes:
        weights: on the device.
        time_weights: what schedules alone are made of, adaptive norms above all, in host memory: no request reads it.
    """

    name = "jax"

    def __init__(
        self,
        config: ModelConfig,
        weights: model.Weights,
        device: jax.Device,
        *,
        num_steps: int,
        options: Options | None = None,
    ) -> None:
        """Takes what `read_weights` gives, and options of XLA, if any."""
        self.config = config
        self.device = device
        self.weights = {name: array for name, array in weights.items() if name != "time"}
        self.time_weights = weights["time"]
        self._run = jax.jit(model.sample_actions, static_argnames="config", compiler_options=options)
        self._make_schedule = jax.jit(model.make_schedule, static_argnames="config")
        self._schedule = functools.lru_cache(KEPT_SCHEDULES)(self._compute_schedule)
        self._schedule(num_steps)

    def sample_actions(self, batch: ModelBatch) -> np.ndarray:
        """Runs the flow and waits for the device: (B, action_horizon, action_dim) float32."""
        inputs, schedule, continues = self.upload(batch), self._schedule(batch.num_steps), self._continued(batch)
        # float32 is to mean float32: an accelerator's default would round its products to fewer bits.
        with jax.default_matmul_precision("highest"):
            actions = self._run(self.config, self.weights, schedule, inputs, continues)
        return np.asarray(actions.block_until_ready())

    def upload(self, batch: ModelBatch) -> model.Inputs:
        arrays = (batch.images, batch.tokens, batch.token_mask, batch.state, batch.noise)
        return model.Inputs(*jax.device_put(arrays, self.device))

    def _continued(self, batch: ModelBatch) -> model.Guided | model.Committed | None:
        if batch.continuation is None:
            return None
        actions, weights = jax.device_put(tuple(batch.continuation), self.device)
        if batch.continues is Method.GUIDED:
            return model.Guided(actions, weights)
        return model.Committed(actions, weights[..., None] > 0, self._done)

    @functools.cached_property
    def _done(self) -> model.Schedule:
        return jax.tree.map(lambda rows: rows[0], self._schedule_at(np.zeros(1, np.float32)))

    def _compute_schedule(self, num_steps: int) -> model.Schedule:
        return self._schedule_at(flow.timesteps(num_steps))

    def _schedule_at(self, times: np.ndarray) -> model.Schedule:
        embedding = flow.time_embedding(times, self.config.expert.width)
        with jax.default_matmul_precision("highest"):
            return self._make_schedule(self.config, self.time_weights, jax.device_put(embedding, self.device))
