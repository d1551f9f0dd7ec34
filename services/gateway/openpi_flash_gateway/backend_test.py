"""A service behind the gateway that does not do as it should: its answers are bytes and statuses that a test lists."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from openpi_flash.v1 import inference_pb2, planner_pb2
from openpi_flash_common.errors import InternalError, UnavailableError

from openpi_flash_gateway import action_backend, backend, planner_backend
from openpi_flash_gateway.action_backend import ActionReplica
from openpi_flash_gateway.backend import Access
from openpi_flash_gateway.conftest import make_settings
from openpi_flash_gateway.planner_backend import PlannerBackend

SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()
GARBAGE = b"\xff"
METADATA = inference_pb2.GetMetadataResponse(model_config_name="fake").SerializeToString()

Answer = bytes | grpc.StatusCode


class Scripted:
    """Each method's answers in turn, the last one for ever. A health watch that answers stays open."""

    port: int

    def __init__(self, service: str, watch: Iterable[Answer] = (SERVING,), **methods: Iterable[Answer]) -> None:
        self._service = service
        self._watch = list(watch)
        self._methods = {name: list(answers) for name, answers in methods.items()}

    async def serve(self, server: grpc.aio.Server) -> None:
        unary = {
            name: grpc.unary_unary_rpc_method_handler(self._unary(answers)) for name, answers in self._methods.items()
        }
        watch = {"Watch": grpc.unary_stream_rpc_method_handler(self._answer_watch)}
        handlers = [(self._service, unary), ("grpc.health.v1.Health", watch)]
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(*pair) for pair in handlers])
        self.port = server.add_insecure_port("127.0.0.1:0")
        await server.start()

    def _unary(self, answers: list[Answer]) -> Any:
        async def handle(_: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return await _next(answers, context)

        return handle

    async def _answer_watch(self, _: bytes, context: grpc.aio.ServicerContext) -> None:
        await context.write(await _next(self._watch, context))
        await asyncio.Event().wait()


async def _next(answers: list[Answer], context: grpc.aio.ServicerContext) -> bytes:
    answer = answers.pop(0) if len(answers) > 1 else answers[0]
    if isinstance(answer, grpc.StatusCode):
        await context.abort(answer, "as listed")
    return answer


@contextlib.asynccontextmanager
async def serving(*services: Scripted) -> AsyncIterator[None]:
    servers = [grpc.aio.server() for _ in services]
    for service, server in zip(services, servers, strict=True):
        await service.serve(server)
    try:
        yield
    finally:
        await asyncio.gather(*(server.stop(None) for server in servers))


class Delays:
    """No pause between two attempts, and which pause it would have been."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> float:
        self.asked.append(index)
        return 0.0


@contextlib.asynccontextmanager
async def action_replica(service: Scripted, tmp_path: Path) -> AsyncIterator[ActionReplica]:
    async with serving(service):
        address = f"127.0.0.1:{service.port}"
        replica = ActionReplica(make_settings(tmp_path).gateway, address, "127.0.0.1", Access(None, ()))
        try:
            yield replica
        finally:
            await replica.close()


@pytest.mark.parametrize(
    ("watch", "metadata", "pauses"),
    [
        ([grpc.StatusCode.CANCELLED, SERVING], [METADATA], [0]),
        ([grpc.StatusCode.UNAVAILABLE, SERVING], [METADATA], [0]),
        ([SERVING], [GARBAGE, METADATA], [0]),
        ([SERVING], [grpc.StatusCode.CANCELLED, METADATA], [0]),
        ([SERVING], [GARBAGE, GARBAGE, grpc.StatusCode.INTERNAL, METADATA], [0, 1, 2]),
    ],
)
async def test_the_health_watch_survives_what_a_service_may_do(watch, metadata, pauses, tmp_path, monkeypatch):
    delays = Delays()
    monkeypatch.setattr(backend, "_RETRY_DELAYS_S", delays)
    async with action_replica(Scripted(action_backend.SERVICE, watch, GetMetadata=metadata), tmp_path) as replica:
        ready = asyncio.Event()

        async def on_change() -> None:
            if not replica.not_ready_reason:
                ready.set()

        watching = asyncio.ensure_future(replica.watch(on_change))
        waiting = asyncio.ensure_future(ready.wait())
        await asyncio.wait({watching, waiting}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        assert not watching.done()
        assert ready.is_set(), replica.not_ready_reason
        assert replica.metadata.model_config_name == "fake"
        assert delays.asked == pauses
        watching.cancel()
        waiting.cancel()
        await asyncio.gather(watching, waiting, return_exceptions=True)


async def test_a_call_that_is_ended_from_outside_is_unavailable_and_one_given_up_is_cancelled(tmp_path):
    class Silent(Scripted):
        def _unary(self, _: list[Answer]) -> Any:
            async def handle(*_: object) -> bytes:
                asked.set()
                return await asyncio.Future()

            return handle

    asked = asyncio.Event()
    async with action_replica(Silent(action_backend.SERVICE, Reset=[b""]), tmp_path) as replica:
        given_up = asyncio.ensure_future(replica.call("Reset", b"", time.monotonic() + 60))
        await asyncio.wait_for(asked.wait(), 20)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        asked.clear()
        calling = asyncio.ensure_future(replica.call("Reset", b"", time.monotonic() + 60))
        await asyncio.wait_for(asked.wait(), 20)
        await replica.close()
        with pytest.raises(UnavailableError, match="was closed"):
            await calling
        with pytest.raises(UnavailableError, match="no longer used"):
            await replica.call("Reset", b"", time.monotonic() + 60)
        with pytest.raises(action_backend._NoAnswerError, match="no longer used"):
            await replica.infer((b"",), time.monotonic() + 60, backend.NO_TRACE)


async def test_a_planners_nonsense_is_laid_at_the_door_of_the_one_that_said_it(tmp_path):
    metadata = [planner_pb2.GetPlannerMetadataResponse().SerializeToString()]
    away, absurd = (
        Scripted(planner_backend.SERVICE, GetPlannerMetadata=metadata, GenerateSubtask=[answer])
        for answer in (grpc.StatusCode.UNAVAILABLE, GARBAGE)
    )
    async with serving(away, absurd):
        addresses = f"127.0.0.1:{away.port},127.0.0.1:{absurd.port}"
        planners = PlannerBackend(make_settings(tmp_path).gateway, addresses)
        both_ready = asyncio.Event()

        async def on_change() -> None:
            if len(planners.ready) == 2:
                both_ready.set()

        watching = asyncio.ensure_future(planners.watch(on_change))
        await asyncio.wait_for(both_ready.wait(), 20)
        message = f"the planner at 127.0.0.1:{absurd.port} did not answer with a GenerateSubtaskResponse"
        for _ in range(2):  # whichever is asked first
            with pytest.raises(InternalError, match=message):
                await planners.generate(b"", time.monotonic() + 10)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await planners.close()
