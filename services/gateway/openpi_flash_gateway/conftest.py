"""A gateway on free ports of this machine, in front of an action service that does as the prompt says."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from openpi_flash.v1 import action_pb2_grpc, inference_pb2, types_pb2
from openpi_flash_common.codec import tensor_to_proto
from openpi_flash_common.errors import InvalidArgumentError, error_to_proto
from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.settings import AuthSettings, EngineSettings, TelemetrySettings, TlsSettings
from openpi_flash_common.telemetry import setup

from openpi_flash_gateway.action_backend import SERVICE
from openpi_flash_gateway.gateway import Gateway

ACTIONS = np.array([[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]])


class FakeActionService(action_pb2_grpc.ActionServiceServicer):
    """Answers ACTIONS plus the seed. Prompts with a meaning: `slow` (waits for `release`), `big` (2 MB of actions),
    `refuse`, `die` and `die once` (the stream ends without an answer)."""

    def __init__(self, tls: TlsSettings | None = None, auth: AuthSettings | None = None) -> None:
        self._secured: dict[str, Any] = {"tls": tls, "auth": auth}
        self.received: list[inference_pb2.InferStreamRequest] = []
        self._arrival = asyncio.Condition()
        self.resets: list[str] = []
        self.num_streams = 0
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()
        self.metadata = inference_pb2.GetMetadataResponse(model_config_name="fake", action_horizon=2)
        self.metadata.policy_metadata.update({"reset_pose": [0, -1.5, 1.5, 0, 0, 0]})
        self.metadata.image_specs.add(path="images/cam_high", encoding=types_pb2.IMAGE_ENCODING_RAW)
        self.server: GrpcServer | None = None
        self.port = 0
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        telemetry = setup(TelemetrySettings(), "action")
        register = {SERVICE: lambda server: action_pb2_grpc.add_ActionServiceServicer_to_server(self, server)}
        self.server = GrpcServer(register, [f"127.0.0.1:{self.port}"], telemetry, drain_seconds=1, **self._secured)
        await self.server.start()
        self.port = self.server.ports[0]
        self._running = asyncio.ensure_future(self.server.run_until_stopped())
        await self.server.set_serving(True)

    async def stop(self) -> None:
        if self.server is not None and self._running is not None:
            self.server.stop()
            await self._running
            self.server = None

    async def wait_received(self, count: int) -> None:
        """Returns when `count` requests have arrived."""
        async with self._arrival:
            await asyncio.wait_for(self._arrival.wait_for(lambda: len(self.received) >= count), 10)

    async def InferStream(self, _: Any, context: Any) -> None:  # noqa: N802
        self.num_streams += 1
        while (request := await context.read()) is not grpc.aio.EOF:
            async with self._arrival:
                self.received.append(request)
                self._arrival.notify_all()
            prompt = request.request.observation.prompt
            if prompt == "die" or (prompt == "die once" and self._is_first(request)):
                return
            try:
                if prompt == "slow":
                    await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            response = inference_pb2.InferStreamResponse(request_id=request.request_id)
            if prompt == "refuse":
                response.error.CopyFrom(error_to_proto(InvalidArgumentError("state: not a number", "state")))
            else:
                actions = np.zeros((512, 512)) if prompt == "big" else ACTIONS + request.request.seed
                response.response.tensors["actions"].CopyFrom(tensor_to_proto(actions))
                response.response.timing.model_ms = 12.5
            await context.write(response)

    async def GetMetadata(self, *_: Any) -> inference_pb2.GetMetadataResponse:  # noqa: N802
        return self.metadata

    async def Reset(self, request: Any, _: Any) -> inference_pb2.ResetResponse:  # noqa: N802
        if not request.session_id:
            raise InvalidArgumentError("session_id: empty", "session_id")
        self.resets.append(request.session_id)
        return inference_pb2.ResetResponse()

    def _is_first(self, request: inference_pb2.InferStreamRequest) -> bool:
        return [r.request for r in self.received].count(request.request) == 1


_ACTION = {"model_config_name": "fake", "checkpoint_dir": "nowhere"}


def make_settings(tmp_path: Path, action_port: int, **gateway: Any) -> EngineSettings:
    return EngineSettings.model_validate(
        {
            "gateway": {"host": "127.0.0.1", "grpc_port": 0, "action_address": f"127.0.0.1:{action_port}", **gateway},
            "action_transport": {"websocket_port": 0, "unix_socket_path": str(tmp_path / "gateway.sock")},
            "action": _ACTION,
        }
    )


@pytest.fixture
async def action_service() -> AsyncIterator[FakeActionService]:
    service = FakeActionService()
    await service.start()
    yield service
    service.release.set()
    await service.stop()


@pytest.fixture
def gateway_settings() -> dict[str, Any]:
    """Overrides of the `gateway` section; a test parametrizes it."""
    return {}


@pytest.fixture
async def gateway(
    action_service: FakeActionService, gateway_settings: dict[str, Any], tmp_path: Path
) -> AsyncIterator[Gateway]:
    async with running_gateway(make_settings(tmp_path, action_service.port, **gateway_settings)) as gateway:
        await asyncio.wait_for(gateway.policy.wait_ready(), 10)
        yield gateway


@contextlib.asynccontextmanager
async def running_gateway(settings: EngineSettings) -> AsyncIterator[Gateway]:
    gateway = Gateway(settings)
    await gateway.start()
    running = asyncio.ensure_future(gateway.run_until_stopped())
    try:
        yield gateway
    finally:
        gateway.stop()
        await running
