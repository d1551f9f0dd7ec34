"""A whole gateway: WebSocket, gRPC and the operators' HTTP in; the action service, the planner or both behind."""

import asyncio
import logging
from pathlib import Path

from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.settings import EngineSettings, TransportSettings
from openpi_flash_common.telemetry import setup

from openpi_flash_gateway.action_backend import ActionBackend
from openpi_flash_gateway.admin import AdminServer
from openpi_flash_gateway.asgi import AsgiServer
from openpi_flash_gateway.endpoint import Admission, Endpoint
from openpi_flash_gateway.grpc_service import SERVICE, PolicyServicer
from openpi_flash_gateway.planner_backend import PlannerBackend
from openpi_flash_gateway.planner_endpoint import PlannerEndpoint
from openpi_flash_gateway.policy import Policy
from openpi_flash_gateway.websocket import WebSocketServer

logger = logging.getLogger(__name__)


class Gateway:
    """A gateway in this process. `start` it, then `run_until_stopped`.

    What it serves follows from the settings: on the action side's WebSocket and socket the policy, combined with the
    planner where there is one; on the planner side's the planner alone; on the gRPC port the policy, or else the
    planner.

    Attributes:
        endpoint: what the gRPC port serves.
        server: its listeners.
        websocket_ports: bound ports of `action` and `planner`, where there is one; known after `start`.
        planner: the planner's replicas; None: there is no planner.
        admin: HTTP for operators; None: not configured.
    """

    def __init__(self, settings: EngineSettings, *, handles_signals: bool = True) -> None:
        """Describes a gateway; nothing listens yet.

        Args:
            handles_signals: False inside a program that has its own way of stopping, and then calls `stop`.

        Raises:
            SettingsError: an address is none, or a file cannot be read.
        """
        gateway = settings.gateway
        self._settings = settings
        self._handles_signals = handles_signals
        self._asgi: list[AsgiServer] = []
        self._telemetry = setup(settings.telemetry, "gateway")
        admission = Admission(gateway.max_in_flight)
        self._action: ActionBackend | None = None
        self.planner: PlannerBackend | None = None
        self._policy: Policy | None = None
        planner: PlannerEndpoint | None = None
        if settings.planner_address is not None:
            self.planner = PlannerBackend(gateway, settings.planner_address)
            planner = PlannerEndpoint(settings, admission, self.planner)
        if settings.action_address is not None:
            self._action = ActionBackend(gateway, settings.action_address)
            self._policy = Policy(settings, admission, self._telemetry.metrics, self._action, planner)
        slots: dict[str, Endpoint | None] = {"action": self._policy, "planner": planner}
        self._endpoints = {slot: endpoint for slot, endpoint in slots.items() if endpoint is not None}
        self.endpoint = next(iter(self._endpoints.values()))

        transports: dict[str, TransportSettings] = {
            "action": settings.action_transport,
            "planner": settings.planner_transport,
        }
        tcp = f"{gateway.host}:{gateway.grpc_port}"
        self._servers = [
            self._grpc_server(endpoint, [tcp] if endpoint is self.endpoint else [], transports[slot].unix_socket_path)
            for slot, endpoint in self._endpoints.items()
        ]
        self.server = self._servers[0]
        self._websockets = {
            slot: WebSocketServer(gateway, endpoint, self._telemetry, slot, transports[slot].websocket_port)
            for slot, endpoint in self._endpoints.items()
        }
        self.websocket_ports: dict[str, int] = {}
        self.admin: AdminServer | None = None
        if gateway.admin is not None:
            subtasks = None if self._policy is None else self._policy.subtasks
            self.admin = AdminServer(settings, self._endpoints, self.planner, subtasks)

    async def start(self) -> None:
        """Listens. The gateway says NOT_SERVING until what it needs behind it serves.

        Raises:
            SettingsError: an address cannot be bound, or a certificate cannot be read.
        """
        for slot, websocket in self._websockets.items():
            self.websocket_ports[slot] = await websocket.start()
            logger.info("listening for WebSockets", extra={"slot": slot, "port": self.websocket_ports[slot]})
        if self.admin is not None:
            await self.admin.start()
        for server in self._servers:
            await server.start()

    async def run_until_stopped(self) -> None:
        """Serves until SIGTERM, SIGINT or `stop`, then finishes what runs."""
        backends = [backend for backend in (self._action, self.planner) if backend is not None]
        try:
            async with asyncio.TaskGroup() as tasks:
                watches = [tasks.create_task(backend.watch(self._on_change)) for backend in backends]
                if self._policy is not None and self.planner is not None:
                    watches.append(tasks.create_task(self._stop_waiting_for_planner(self._policy)))
                drain = tasks.create_task(self._drain())
                await self.server.run_until_stopped()
                await drain
                for watch in watches:
                    watch.cancel()
        finally:
            if self._policy is not None and self._policy.subtasks is not None:
                self._policy.subtasks.close()
            for backend in backends:
                await backend.close()
            self._telemetry.shutdown()

    def asgi(self) -> AsgiServer:
        """What the gateway serves first, as an ASGI application beside its own ports; for the gateway's event loop."""
        self._asgi.append(AsgiServer(self._settings.gateway, self.endpoint, self._telemetry))
        return self._asgi[-1]

    def stop(self) -> None:
        """Makes `run_until_stopped` stop the gateway and return."""
        self.server.stop()

    def _grpc_server(self, endpoint: Endpoint, addresses: list[str], socket: Path) -> GrpcServer:
        gateway = self._settings.gateway
        servicer = PolicyServicer(endpoint, self._telemetry)
        servicer.server = GrpcServer(
            {SERVICE: servicer.register},
            [*addresses, f"unix:{socket}"],
            self._telemetry,
            tls=gateway.tls,
            auth=gateway.auth,
            max_message_bytes=gateway.max_message_bytes,
            handles_signals=self._handles_signals and bool(addresses),
        )
        return servicer.server

    async def _on_change(self) -> None:
        was_ready = self.endpoint.is_ready
        for endpoint, server in zip(self._endpoints.values(), self._servers, strict=True):
            await server.set_serving(endpoint.refresh())
        if self.endpoint.is_ready and not was_ready:
            settings = self._settings
            logger.info("Service ready (mode=%s, slots=[%s])", settings.mode, ", ".join(settings.slots))

    async def _stop_waiting_for_planner(self, policy: Policy) -> None:
        await asyncio.sleep(self._settings.gateway.planner_start_timeout_ms / 1e3)
        if policy.waits_for_planner:
            logger.warning("the planner is not ready yet; actions are served without it until it is")
            policy.waits_for_planner = False
            await self._on_change()

    async def _drain(self) -> None:
        await self.server.wait_stopping()
        for server in self._servers:
            server.stop()
        await asyncio.gather(
            *(websocket.drain() for websocket in self._websockets.values()),
            *(application.drain() for application in self._asgi),
            *(server.run_until_stopped() for server in self._servers[1:]),
        )
        if self.admin is not None:
            await self.admin.stop()
