"""Loads, compiles and runs the PyTorch model."""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from openpi_flash_models import flow
from openpi_flash_models.checkpoints.source import TensorSource
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.realtime import Method
from openpi_flash_models.request import ModelBatch
from openpi_flash_models.torch import fp8, selection
from openpi_flash_models.torch.graphs import CudaRecorder, StaticCalls, upload
from openpi_flash_models.torch.model import Inputs, Pi0, Schedule, Step, integrate, make_schedule
from openpi_flash_models.torch.realtime import sample_committed, sample_guided
from openpi_flash_models.torch.weights import read_model

COMPILE_MODES = {
    "default": "default",
    "reduce-overhead": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
    "max-autotune-no-cudagraphs": "max-autotune-no-cudagraphs",
}
"""torch.compile's modes, to what of each is left to the compiler: the CUDA graph around everything is ours."""

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
    prefix_precision: str | None = None,
    compile_mode: str | None = None,
    num_steps: int = flow.DEFAULT_NUM_STEPS,
) -> "TorchBackend":
    """Builds a model from a checkpoint. Host memory never holds more than the weights and one stored tensor.

    Args:
        config: sizes; the checkpoint must fit them.
        source: tensors under openpi's PyTorch names.
        device: a PyTorch device, e.g. `cuda` or `cpu`.
        precision: `bfloat16` (mixed, see model.py) or `float32`.
        prefix_precision: `fp8`: the matrices of the vision tower and the VLM in FP8 where this hardly moves the
            actions; None: as `precision` says.
        compile_mode: one of COMPILE_MODES; not compiled when None. Each shape compiles at its first call.
        num_steps: the number of flow steps to prepare for. Others are prepared when first asked for.

    Raises:
        CheckpointError: a tensor is missing or misshaped.
        PolicyConfigError: an unknown precision or compile mode, a device that is not there or has no FP8, or weights
            that FP8 rounds too roughly.
    """
    if prefix_precision not in (None, "fp8"):
        raise PolicyConfigError(f"prefix_precision: {prefix_precision!r} is unknown; expected fp8 or none")
    if prefix_precision == "fp8" and precision != "bfloat16":
        raise PolicyConfigError(f"prefix_precision: fp8 goes with the precision bfloat16, not with {precision}")
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
    if prefix_precision == "fp8":
        fp8.quantise_prefix(model, num_steps)
    return TorchBackend(model, device, compile_mode=compile_mode, num_steps=num_steps)


class TorchBackend:
    """A loaded PyTorch model on one device. Not thread-safe; on a GPU, everything happens in the thread that made it.

    On a GPU each shape is recorded as one CUDA graph, from the uploaded inputs to the actions, at its first call.
    """

    name = "torch"

    def __init__(self, model: Pi0, device: str, *, compile_mode: str | None, num_steps: int) -> None:
        self.config: ModelConfig = model.config
        self.model = model
        self.device = torch.device(device)
        self._prepare, self._velocity = model.prepare, model.velocity
        if compile_mode is None:
            model.ops = selection.choose(self.config, self.device, model.dtype)
        else:
            torch._dynamo.config.recompile_limit = MAX_COMPILED_SHAPES
            # What is compiled is one flow step, whatever the number of steps.
            compiled = functools.partial(torch.compile, mode=COMPILE_MODES[compile_mode], fullgraph=True, dynamic=False)
            self._prepare, self._velocity = compiled(model.prepare), compiled(model.velocity)
        self._schedule = functools.lru_cache(KEPT_SCHEDULES)(self._compute_schedule)
        self._schedule(num_steps)
        self._recorded: dict[Method | None, StaticCalls] = {}
        if self.device.type == "cuda":
            recorder = CudaRecorder(self.device)
            self._recorded = {
                continues: StaticCalls(functools.partial(self._bind, continues), self.device, recorder)
                for continues in (None, *Method)
            }

    def sample_actions(self, batch: ModelBatch) -> np.ndarray:
        """Runs the flow and waits for the device: (B, action_horizon, action_dim) float32.

        Chunks that continue others are not compiled.
        """
        with torch.inference_mode():
            if batch.continues in self._recorded:
                return self._recorded[batch.continues](batch)
            return self._bind(batch.continues, self.upload(batch), batch.num_steps)().cpu().numpy()

    def upload(self, batch: ModelBatch) -> Inputs:
        return upload(batch, self.device)

    def _bind(self, continues: Method | None, inputs: Inputs, num_steps: int) -> Callable[[], Tensor]:
        schedule = self._schedule(num_steps)
        if continues is Method.GUIDED:
            return functools.partial(sample_guided, self.model, inputs, schedule)
        if continues is Method.TRAINED:
            return functools.partial(sample_committed, self.model, inputs, schedule, self._done)
        return functools.partial(integrate, self._prepare, self._velocity, inputs, schedule)

    @functools.cached_property
    def _done(self) -> Step:
        embedding = flow.time_embedding(np.zeros(1, np.float32), self.config.expert.width)
        with torch.inference_mode(False), torch.no_grad():
            (step,) = self.model.schedule(torch.from_numpy(embedding))
        return step

    def _compute_schedule(self, num_steps: int) -> Schedule:
        # Not in inference mode: a guided flow is differentiated, and a schedule takes part in it.
        with torch.inference_mode(False), torch.no_grad():
            return make_schedule(self.model, num_steps)
