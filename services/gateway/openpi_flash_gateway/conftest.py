"""A gateway on free ports of this machine, in front of services that do as the prompt says."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from openpi_flash.v1 import action_pb2_grpc, inference_pb2, planner_pb2, planner_pb2_grpc, types_pb2
from openpi_flash_common import openpi_msgpack
from openpi_flash_common.codec import tensor_to_proto
from openpi_flash_common.errors import InternalError, InvalidArgumentError, error_to_proto
from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.settings import AuthSettings, EngineSettings, TelemetrySettings, TlsSettings
from openpi_flash_common.telemetry import setup
from websockets.asyncio.client import ClientConnection

from openpi_flash_gateway import action_backend, planner_backend
from openpi_flash_gateway.gateway import Gateway

ACTIONS = np.array([[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]])


class _FakeService:
    """A service that can be stopped and started again at the same port."""

    def __init__(self, name: str, register: Callable[[Any, Any], None], **secured: Any) -> None:
        self._register = {name: lambda server: register(self, server)}
        self._secured = secured
        self.server: GrpcServer | None = None
        self.port = 0
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        telemetry = setup(TelemetrySettings(), "action")
        address = f"127.0.0.1:{self.port}"
        self.server = GrpcServer(self._register, [address], telemetry, drain_seconds=1, **self._secured)
        await self.server.start()
        self.port = self.server.ports[0]
        self._running = asyncio.ensure_future(self.server.run_until_stopped())
        await self.server.set_serving(True)

    async def stop(self) -> None:
        if self.server is not None and self._running is not None:
            self.server.stop()
            await self._running
            self.server = None


class FakeActionService(_FakeService, action_pb2_grpc.ActionServiceServicer):
    """Answers ACTIONS plus the seed. Prompts with a meaning: `slow` (waits for `release`), `big` (2 MB of actions),
    `refuse`, `die` and `die once` (the stream ends without an answer)."""

    def __init__(self, tls: TlsSettings | None = None, auth: AuthSettings | None = None) -> None:
        register = action_pb2_grpc.add_ActionServiceServicer_to_server
        super().__init__(action_backend.SERVICE, register, tls=tls, auth=auth)
        self.received: list[inference_pb2.InferStreamRequest] = []
        self._arrival = asyncio.Condition()
        self.resets: list[str] = []
        self.num_streams = 0
        self.num_open_streams = 0
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()
        self.metadata = inference_pb2.GetMetadataResponse(model_config_name="fake", action_horizon=2)
        self.metadata.policy_metadata.update({"reset_pose": [0, -1.5, 1.5, 0, 0, 0]})
        self.metadata.image_specs.add(path="images/cam_high", encoding=types_pb2.IMAGE_ENCODING_RAW)

    @property
    def prompts(self) -> list[str]:
        return [received.request.observation.prompt for received in self.received]

    async def wait_received(self, count: int) -> None:
        """Returns when `count` requests have arrived."""
        async with self._arrival:
            await asyncio.wait_for(self._arrival.wait_for(lambda: len(self.received) >= count), 10)

    async def InferStream(self, _: Any, context: Any) -> None:  # noqa: N802
        self.num_streams += 1
        self.num_open_streams += 1
        try:
            await self._answer(context)
        finally:
            self.num_open_streams -= 1

    async def _answer(self, context: Any) -> None:
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


class FakePlannerService(_FakeService, planner_pb2_grpc.PlannerServiceServicer):
    """Writes `step 1`, `step 2` and so on. Tasks with a meaning: `nothing` (an empty text), `broken`, `cancelled`;
    with `hold`
    cleared, answers wait until it is set."""

    def __init__(self) -> None:
        super().__init__(planner_backend.SERVICE, planner_pb2_grpc.add_PlannerServiceServicer_to_server)
        self.received: list[planner_pb2.GenerateSubtaskRequest] = []
        self.num_cancelled = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self.config = planner_pb2.PlannerConfig(action_prompt_template="{task}. Subtask: {subtask}")

    async def GenerateSubtask(self, request: Any, context: Any) -> planner_pb2.GenerateSubtaskResponse:  # noqa: N802
        self.received.append(request)
        task, text = request.observation.prompt, f"step {len(self.received)}"
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if task == "cancelled":
            await context.abort(grpc.StatusCode.CANCELLED, "given up")
        if task == "broken":
            raise InternalError("the planner is broken")
        if task == "nothing":
            return planner_pb2.GenerateSubtaskResponse(num_tokens=1)
        return planner_pb2.GenerateSubtaskResponse(text=text, ms=3.5, action_prompt=f"{task}. Subtask: {text}")

    async def GetConfig(self, *_: Any) -> planner_pb2.GetConfigResponse:  # noqa: N802
        return planner_pb2.GetConfigResponse(config=self.config)

    async def UpdateConfig(self, request: Any, _: Any) -> planner_pb2.UpdateConfigResponse:  # noqa: N802
        if request.top_k == 13:
            raise InvalidArgumentError("top_k: 13 is unlucky", "top_k")
        self.config.MergeFrom(planner_pb2.PlannerConfig.FromString(request.SerializeToString()))
        return planner_pb2.UpdateConfigResponse(config=self.config)

    async def GetPlannerMetadata(self, *_: Any) -> planner_pb2.GetPlannerMetadataResponse:  # noqa: N802
        answer = planner_pb2.GetPlannerMetadataResponse(model_config_name="fake_planner")
        answer.image_specs.add(path="images/cam_high")
        return answer


def make_settings(
    tmp_path: Path,
    action_port: int | None = None,
    *,
    planner_ports: Sequence[int] = (),
    planner: dict[str, Any] | None = None,
    **gateway: Any,
) -> EngineSettings:
    """Settings with an action section, unless there are planner ports alone, and with a planner section where there are
    planner ports. Keywords are fields of the `gateway` section."""
    sections: dict[str, Any] = {
        "gateway": {"host": "127.0.0.1", "grpc_port": 0, "admin": {"port": 0}, **gateway},
        "action_transport": {"websocket_port": 0, "unix_socket_path": str(tmp_path / "action.sock")},
        "planner_transport": {"websocket_port": 0, "unix_socket_path": str(tmp_path / "planner.sock")},
    }
    if action_port is not None:
        sections["gateway"]["action"] = {"address": f"127.0.0.1:{action_port}"}
    if planner_ports:
        addresses = ",".join(f"127.0.0.1:{port}" for port in planner_ports)
        sections["gateway"]["planner"] = {"address": addresses}
        sections["planner"] = {"checkpoint_dir": "nowhere", **(planner or {})}
    if action_port is not None or not planner_ports:
        sections["action"] = {"model_config_name": "fake", "checkpoint_dir": "nowhere"}
    return EngineSettings.model_validate(sections)


@pytest.fixture
async def action_service() -> AsyncIterator[FakeActionService]:
    service = FakeActionService()
    await service.start()
    yield service
    service.release.set()
    await service.stop()


@pytest.fixture
async def planner_service() -> AsyncIterator[FakePlannerService]:
    service = FakePlannerService()
    await service.start()
    yield service
    service.hold.set()
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
        await asyncio.wait_for(gateway.endpoint.wait_ready(), 10)
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


async def ask(connection: ClientConnection, **observation: Any) -> Any:
    """An observation over a WebSocket, and the reply to it: unpacked, or the text that says what was wrong."""
    await connection.send(openpi_msgpack.packb({"state": np.zeros(3), **observation}))
    answer = await asyncio.wait_for(connection.recv(), 10)
    return answer if isinstance(answer, str) else openpi_msgpack.unpackb(answer)
