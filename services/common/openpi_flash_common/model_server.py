"""A service around one model on one accelerator: listens at once, serves when the model is loaded and warm."""

import abc
import asyncio
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import grpc
from openpi_flash.v1 import types_pb2

from openpi_flash_common.errors import DeadlineExceededError, UnavailableError
from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.process import settle
from openpi_flash_common.scheduler import Answer, Prepared, RunnableModel, Scheduler, as_it_is
from openpi_flash_common.settings import ModelSettings, SettingsError, WarmUpSettings
from openpi_flash_common.telemetry import Span, Telemetry

logger = logging.getLogger(__name__)


class WarmUpShape(Protocol):
    """Shape of one model call."""

    @property
    def batch_size(self) -> int: ...
    @property
    def prompt_bucket(self) -> int: ...
    def _asdict(self) -> dict[str, Any]: ...


ModelT = TypeVar("ModelT", bound=RunnableModel)
ShapeT = TypeVar("ShapeT", bound=WarmUpShape)


class ModelServicer(abc.ABC, Generic[ModelT]):
    """What the gRPC handlers around a model are alike in.

    Attributes:
        server: where they are registered; must be set before the first call.
        scheduler: runs the model.
        model: None: not loaded and warm yet.
    """

    server: GrpcServer

    def __init__(self, scheduler: Scheduler, model_kind: str) -> None:
        """Takes, for errors, what the model is called: `policy`, `planner`."""
        self.scheduler = scheduler
        self.model: ModelT | None = None
        self._model_kind = model_kind

    @abc.abstractmethod
    def register(self, server: grpc.aio.Server) -> None:
        """Adds the handlers to a gRPC server."""

    def ready_model(self) -> ModelT:
        """The model; raises UnavailableError while there is none."""
        if self.model is None:
            raise UnavailableError(f"the {self._model_kind} is being loaded and warmed up; try again later")
        return self.model

    async def infer(
        self,
        prepare: Callable[[ModelT], Prepared],
        timeout_s: float | None,
        span: Span,
        finish: Callable[[Any, Any], Any] = as_it_is,
    ) -> Answer:
        """Has a request answered.

        Args:
            prepare: makes the prepared request; called in a thread.
            timeout_s: time that is left; None: any.
            span, finish, other raised errors: as those of `Scheduler.infer`.

        Raises:
            UnavailableError: the model is not ready.
            DeadlineExceededError: the time was over before the answer was there.
        """
        model, deadline = self.ready_model(), deadline_after(timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                return await self.scheduler.infer(model, functools.partial(prepare, model), deadline, span, finish)
        except TimeoutError:
            raise DeadlineExceededError("the request's time ran out before the answer was there") from None


def deadline_after(timeout_s: float | None) -> float:
    """`time.monotonic()` seconds at which the time that is left will be over; None: never."""
    return math.inf if timeout_s is None else time.monotonic() + timeout_s


def timing_to_proto(answer: Answer, arrived: float) -> types_pb2.Timing:
    """Where the time of an answer went, up to now, since it arrived (`time.monotonic()` seconds)."""
    return types_pb2.Timing(
        queue_ms=answer.queue_ms,
        preprocess_ms=answer.preprocess_ms,
        model_ms=answer.model_ms,
        postprocess_ms=answer.postprocess_ms,
        total_ms=(time.monotonic() - arrived) * 1e3,
        batch_size=answer.batch_size,
    )


async def serve_model(
    service: str,
    servicer: ModelServicer[ModelT],
    settings: ModelSettings,
    telemetry: Telemetry,
    load: Callable[[], ModelT],
) -> None:
    """Starts a server, loads the model in the accelerator's thread, and runs until SIGTERM; then closes everything.

    Args:
        service: full name of the gRPC service.
        servicer: its handlers; gets its model just before the service says that it is ready.
        settings: where it listens.
        load: gives the model, warmed up.

    Raises:
        AcceleratorLostError: only a new process can help.
        Exception: what `load` raised.
    """
    logging.getLogger("jax").setLevel(logging.WARNING)  # it tells of every accelerator that is not there
    scheduler = servicer.scheduler
    server = servicer.server = GrpcServer(
        {service: servicer.register},
        [f"{settings.host}:{settings.grpc_port}"],
        telemetry,
        tls=settings.tls,
        auth=settings.auth,
        max_message_bytes=settings.max_message_bytes,
    )
    await server.start()
    running = asyncio.ensure_future(server.run_until_stopped())
    loading = asyncio.ensure_future(scheduler.on_accelerator(load))
    await asyncio.wait({running, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():  # stopped during a long compile, which no thread can be talked out of
        logger.info("stopped before the model was ready")
        os._exit(0)
    try:
        servicer.model = loading.result()
        settle()
        await server.set_serving(True)
        await asyncio.wait({running, scheduler.lost}, return_when=asyncio.FIRST_COMPLETED)
        if scheduler.lost.done():
            scheduler.lost.result()
    finally:
        server.stop()
        await running
        scheduler.close()
        telemetry.shutdown()


def warm_up(
    run: Callable[[Sequence[ShapeT], Callable[[int, int, ShapeT], None]], None],
    shapes: Sequence[ShapeT],
    wanted: WarmUpSettings,
    section: str,
) -> None:
    """Has a model called once in each shape that is to be warm, and logs how far it is.

    Args:
        run: the model's `warm_up`.
        shapes: the model's `warm_up_shapes`.
        section: name of the settings' section, for errors.

    Raises:
        SettingsError: a size is wanted that this model never runs.
    """
    started = time.monotonic()
    chosen = select_shapes(shapes, wanted, section)
    run(chosen, _log_progress)
    logger.info("warm", extra={"shapes": len(chosen), "warm_up_s": round(time.monotonic() - started, 2)})


def select_shapes(shapes: Sequence[ShapeT], wanted: WarmUpSettings, section: str) -> list[ShapeT]:
    """Of all shapes those to warm up; raises as `warm_up`."""
    batch_sizes = _sizes(f"{section}.warm_up.batch_sizes", wanted.batch_sizes, {shape.batch_size for shape in shapes})
    prompt_buckets = _sizes(
        f"{section}.warm_up.prompt_buckets", wanted.prompt_buckets, {shape.prompt_bucket for shape in shapes}
    )
    return [shape for shape in shapes if shape.batch_size in batch_sizes and shape.prompt_bucket in prompt_buckets]


def _sizes(name: str, wanted: Sequence[int] | None, possible: set[int]) -> set[int]:
    unknown = set(wanted or ()) - possible
    if unknown:
        raise SettingsError(f"{name}: {_join(unknown)} cannot occur; {_join(possible)} can")
    return possible if wanted is None else set(wanted)


def _log_progress(done: int, total: int, shape: WarmUpShape) -> None:
    logger.info("warming up", extra={"done": done, "of": total, **shape._asdict()})


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
