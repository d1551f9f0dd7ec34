"""A service around one model on one accelerator: listens at once, serves when the model is loaded and warm."""

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import grpc

from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.scheduler import Scheduler
from openpi_flash_common.settings import ModelSettings, SettingsError, WarmUpSettings
from openpi_flash_common.telemetry import Telemetry

logger = logging.getLogger(__name__)


class WarmUpShape(Protocol):
    """Shape of one model call."""

    @property
    def batch_size(self) -> int: ...
    @property
    def prompt_bucket(self) -> int: ...
    def _asdict(self) -> dict[str, Any]: ...


ModelT = TypeVar("ModelT")
ShapeT = TypeVar("ShapeT", bound=WarmUpShape)


def make_server(
    service: str, register: Callable[[grpc.aio.Server], None], settings: ModelSettings, telemetry: Telemetry
) -> GrpcServer:
    """The gRPC server of one service, where its settings want it."""
    return GrpcServer(
        {service: register},
        [f"{settings.host}:{settings.grpc_port}"],
        telemetry,
        tls=settings.tls,
        auth=settings.auth,
        max_message_bytes=settings.max_message_bytes,
    )


async def serve_model(
    server: GrpcServer,
    scheduler: Scheduler,
    telemetry: Telemetry,
    load: Callable[[], ModelT],
    on_ready: Callable[[ModelT], None],
) -> None:
    """Starts the server, loads the model in the accelerator's thread, and runs until SIGTERM; then closes all of them.

    Args:
        load: gives the model, warmed up.
        on_ready: is handed the model, just before the service says that it is ready.

    Raises:
        AcceleratorLostError: only a new process can help.
        Exception: what `load` raised.
    """
    logging.getLogger("jax").setLevel(logging.WARNING)  # it tells of every accelerator that is not there
    await server.start()
    running = asyncio.ensure_future(server.run_until_stopped())
    loading = asyncio.ensure_future(scheduler.on_accelerator(load))
    await asyncio.wait({running, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():  # stopped during a long compile, which no thread can be talked out of
        logger.info("stopped before the model was ready")
        os._exit(0)
    try:
        on_ready(loading.result())
        # A collection that walks all that a framework made takes over 100 ms; nothing of it is garbage.
        gc.collect()
        gc.freeze()
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
