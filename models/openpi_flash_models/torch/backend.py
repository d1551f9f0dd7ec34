"""Loads, compiles and runs the PyTorch model."""

import functools

import numpy as np
import torch
from torch import Tensor

from openpi_flash_models import flow
from openpi_flash_models.checkpoints.source import TensorSource
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.realtime import Method
from openpi_flash_models.request import ModelBatch
from openpi_flash_models.torch.model import Inputs, Pi0, Schedule
from openpi_flash_models.torch.realtime import sample_committed, sample_guided
from openpi_flash_models.torch.weights import read_model

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}

KEPT_SCHEDULES = 8
"""Numbers of steps whose schedules are kept; a schedule of a full-size model is a few MB."""

MAX_COMPILED_SHAPES = 256
"""The compiler's own limit is 8, below what views, prompt buckets, batch sizes and numbers of steps make together."""


def load(
    config: ModelConfig,
    source: TensorSource,
    *,
    device: str = "cpu",
    precision: str = "bfloat16",
    compile_mode: str | None = None,
    num_steps: int = flow.DEFAULT_NUM_STEPS,
) -> "TorchBackend":
    """Builds a model from a checkpoint. Host memory never holds more than the weights and one stored tensor.

    Args:
        config: sizes; the checkpoint must fit them.
        source: tensors under openpi's PyTorch names.
        device: a PyTorch device, e.g. `cuda` or `cpu`.
        precision: `bfloat16` (mixed, see model.py) or `float32`.
        compile_mode: one of COMPILE_MODES; eager when None. Each shape compiles at its first call.
        num_steps: the number of flow steps to prepare for. Others are prepared when first asked for.

    Raises:
        CheckpointError: a tensor is missing or misshaped.
        PolicyConfigError: an unknown precision or compile mode, or a device that is not there.
    """
    if precision not in PRECISIONS:
        raise PolicyConfigError(f"precision: {precision!r} is unknown; expected one of {', '.join(PRECISIONS)}")
    if compile_mode is not None and compile_mode not in COMPILE_MODES:
        raise PolicyConfigError(
            f"compile_mode: {compile_mode!r} is unknown; expected one of {', '.join(COMPILE_MODES)}"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PolicyConfigError(f"device: {device!r} is none that PyTorch can use here: {error}") from error
    model = read_model(config, source, PRECISIONS[precision], device)
    return TorchBackend(model, device, compile_mode=compile_mode, num_steps=num_steps)


class TorchBackend:
    """A loaded PyTorch model on one device. Not thread-safe."""

    name = "torch"

    def __init__(self, model: Pi0, device: str, *, compile_mode: str | None, num_steps: int) -> None:
        self.config: ModelConfig = model.config
        self.model = model
        self.device = torch.device(device)
        self._run = model.sample_actions
        if compile_mode is not None:
            torch._dynamo.config.recompile_limit = MAX_COMPILED_SHAPES
            self._run = torch.compile(model.sample_actions, mode=compile_mode, fullgraph=True, dynamic=False)
        self._schedule = functools.lru_cache(KEPT_SCHEDULES)(self._compute_schedule)
        self._schedule(num_steps)

    def sample_actions(self, batch: ModelBatch) -> np.ndarray:
        """Runs the flow and waits for the device: (B, action_horizon, action_dim) float32.

        Chunks that continue others are computed eagerly, whatever the compile mode.
        """
        if batch.continuation is not None:
            with torch.no_grad():
                return self._continue(batch, *map(self._to_device, batch.continuation)).cpu().numpy()
        with torch.inference_mode():
            return self._run(self.upload(batch), self._schedule(batch.num_steps)).cpu().numpy()

    def upload(self, batch: ModelBatch) -> Inputs:
        arrays = (batch.images, batch.tokens, batch.token_mask, batch.state, batch.noise)
        return Inputs(*map(self._to_device, arrays))

    def _continue(self, batch: ModelBatch, actions: Tensor, weights: Tensor) -> Tensor:
        inputs, schedule = self.upload(batch), self._schedule(batch.num_steps)
        if batch.continues is Method.GUIDED:
            return sample_guided(self.model, inputs, schedule, actions, weights)
        return sample_committed(self.model, inputs, schedule, done=self._done, actions=actions, weights=weights)

    @functools.cached_property
    def _done(self) -> Schedule:
        return self._schedule_at(np.zeros(1, np.float32))

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _compute_schedule(self, num_steps: int) -> Schedule:
        return self._schedule_at(flow.timesteps(num_steps))

    def _schedule_at(self, times: np.ndarray) -> Schedule:
        with torch.no_grad():  # and not in inference mode: guidance goes back through what a schedule takes part in
            embedding = flow.time_embedding(times, self.config.expert.width)
            return self.model.schedule(self._to_device(embedding))
