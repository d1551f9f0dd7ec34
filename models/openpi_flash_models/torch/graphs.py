"""Model calls on buffers that stay where they are, so that a whole call can be recorded once and replayed.

A CUDA graph reads and writes the addresses with which it was recorded. `StaticCalls` keeps, for each shape, the buffers
of its inputs and the recording; `CudaRecorder` is the part that only a GPU can run.
"""

import collections
import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from openpi_flash_models.request import ModelBatch
from openpi_flash_models.torch.model import Inputs

logger = logging.getLogger(__name__)

KEPT_SHAPES = 48
"""Recordings that are kept: those of all shapes of a robot with one to three cameras, four prompt lengths and batches
of up to 8."""

ALIGNMENT = 256
"""Of each input in the common buffer, in bytes: enough for any element type and any kernel."""


class Recorder(Protocol):
    """How a device records and replays."""

    pins_memory: bool
    """Whether host buffers are to be page-locked, so that copies need not wait."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Calls a function; returns what does the same once more, and the tensor in which each result lies then.

        Where this fails, earlier recordings are as they were, and others can be made.
        """
        ...

    def run(self, functions: list[Callable[[], object]]) -> None:
        """Calls functions one after the other and waits for what they started on the device."""
        ...


class StaticInputs:
    """The inputs of one shape, in one buffer of the device, and their twin on the host."""

    def __init__(self, batch: ModelBatch, device: torch.device, *, pin: bool) -> None:
        """Takes the shapes and types of a batch, not its contents."""
        arrays = arrays_of(batch)
        offsets = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)])
        self._host = torch.zeros(int(offsets[-1]), dtype=torch.uint8, pin_memory=pin)
        self._device = torch.zeros_like(self._host, device=device)

        def part(buffer: Tensor, offset: int, array: np.ndarray) -> Tensor:
            flat = buffer[offset : offset + array.nbytes]
            return flat.view(torch.from_numpy(np.empty(0, array.dtype)).dtype).view(array.shape)

        places = list(zip(map(int, offsets), arrays, strict=False))
        self._arrays = [part(self._host, *place).numpy() for place in places]
        self.on_device = Inputs(*(part(self._device, *place) for place in places))

    def fill(self, batch: ModelBatch) -> None:
        """Copies a batch into the host's buffer."""
        for place, array in zip(self._arrays, arrays_of(batch), strict=True):
            np.copyto(place, array)

    def upload(self) -> None:
        """Starts the copy to the device: one, of everything."""
        self._device.copy_(self._host, non_blocking=True)


class _Call(NamedTuple):
    inputs: StaticInputs
    replay: Callable[[], object]
    download: Callable[[], object]
    answer: np.ndarray
    function: Callable[[], Tensor]
    """What was recorded: it holds the tensors that a replay reads."""


class StaticCalls:
    """Calls of one function, recorded for each shape at its first call. Not thread-safe: one thread for all calls.

    A shape that cannot be recorded is called piece by piece instead: the same numbers, more slowly, and a warning.
    """

    def __init__(
        self,
        bind: Callable[[Inputs, int], Callable[[], Tensor]],
        device: torch.device,
        recorder: Recorder,
        *,
        kept: int = KEPT_SHAPES,
    ) -> None:
        """
        Args:
            bind: from inputs on the device and a number of flow steps to the function to record, which gives the
                actions.
            device: where the inputs go.
            recorder: how it records there.
            kept: recordings that are kept; the one that was not used for longest goes.
        """
        self._bind = bind
        self._device = device
        self._recorder = recorder
        self._kept = kept
        self._calls: collections.OrderedDict[tuple[object, ...], _Call] = collections.OrderedDict()

    def __call__(self, batch: ModelBatch) -> np.ndarray:
        """Runs the function on a batch and waits for the device: (B, H, A) float32."""
        key = (batch.num_steps, *((array.shape, array.dtype) for array in arrays_of(batch)))
        call = self._calls.pop(key, None)
        if call is None:
            while len(self._calls) >= self._kept:
                self._calls.popitem(last=False)
            call = self._record(batch)
        self._calls[key] = call
        call.inputs.fill(batch)
        self._recorder.run([call.inputs.upload, call.replay, call.download])
        return call.answer.copy()

    def _record(self, batch: ModelBatch) -> _Call:
        pin = self._recorder.pins_memory
        inputs = StaticInputs(batch, self._device, pin=pin)
        inputs.fill(batch)
        self._recorder.run([inputs.upload])
        function = self._bind(inputs.on_device, batch.num_steps)
        try:
            replay, result = self._recorder.record(function)
        except Exception as error:  # whatever a library does that cannot be recorded
            shapes = ", ".join(str(array.shape) for array in arrays_of(batch))
            message = "inference will be slower: inputs of the shapes %s cannot be recorded: %s"
            logger.warning(message, shapes, error, exc_info=True)  # of errors in a row the first says why
            replay, result = self._unrecorded(function)
        answer = torch.empty(result.shape, dtype=result.dtype, pin_memory=pin)
        return _Call(inputs, replay, lambda: answer.copy_(result, non_blocking=True), answer.numpy(), function)

    def _unrecorded(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """What `record` returns, by calling the function each time."""
        results: list[Tensor] = []
        self._recorder.run([lambda: results.append(function())])
        (result,) = results
        return lambda: result.copy_(function()), result


class CudaRecorder:
    """CUDA graphs on a stream of their own, whose intermediate results share one pool of memory.

    They may share it, since a result is copied out before any other graph runs.
    """

    pins_memory = True

    def __init__(self, device: torch.device) -> None:
        """Must be made, and used, in the thread that will replay."""
        torch.cuda.synchronize(device)  # weights were copied on another stream
        self._device = device
        self._done = torch.cuda.Event()
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._begin()

    def _begin(self) -> None:
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        # Once without recording: libraries set themselves up and kernels compile at their first call.
        self.run([function])
        graph = torch.cuda.CUDAGraph()
        # Threads that prepare requests do not touch the GPU; were one to, only its own capture should mind.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(self._stream), capture:  # a capture that fails may leave its stream the current one
                result = function()
        except Exception:
            # The allocator goes on asking a graph that failed what belongs to it, and takes no other into its pool.
            self._failed.append(graph)
            self._begin()
            raise
        return graph.replay, result

    def run(self, functions: list[Callable[[], object]]) -> None:
        with torch.cuda.stream(self._stream):
            for function in functions:
                function()
            self._done.record()
        self._done.synchronize()


def upload(batch: ModelBatch, device: torch.device) -> Inputs:
    """A batch on a device, in buffers of its own."""
    return Inputs(*(torch.from_numpy(array).to(device) for array in arrays_of(batch)))


def arrays_of(batch: ModelBatch) -> tuple[np.ndarray, ...]:
    """A batch in the order of `Inputs`."""
    return batch.images, batch.tokens, batch.token_mask, batch.state, batch.noise, *(batch.continuation or ())
