"""A whole gateway: WebSocket and gRPC in, the action service behind."""

import asyncio
import logging

from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.settings import EngineSettings
from openpi_flash_common.telemetry import setup

from openpi_flash_gateway.action_backend import ActionBackend
from openpi_flash_gateway.grpc_service import SERVICE, PolicyServicer
from openpi_flash_gateway.policy import Policy
from openpi_flash_gateway.websocket import WebSocketServer

logger = logging.getLogger(__name__)


class Gateway:
    """A gateway in this process. `start` it, then `run_until_stopped`.

    Attributes:
        policy: what answers.
        server: its gRPC listeners.
        websocket_port: bound port; known after `start`.
    """

    websocket_port: int

    def __init__(self, settings: EngineSettings) -> None:
        """Describes a gateway; nothing listens yet.

        Raises:
            SettingsError: there is no action service to talk to, or a file cannot be read.
        """
        if settings.planner is not None:
            logger.warning("the section `planner` is configured, but this gateway does not use a planner yet")
        gateway = settings.gateway
        self._telemetry = setup(settings.telemetry, "gateway")
        self._action = ActionBackend(settings)
        self.policy = Policy(gateway, self._action)
        servicer = PolicyServicer(self.policy, self._telemetry)
        self.server = servicer.server = GrpcServer(
            {SERVICE: servicer.register},
            [f"{gateway.host}:{gateway.grpc_port}", f"unix:{settings.action_transport.unix_socket_path}"],
            self._telemetry,
            tls=gateway.tls,
            auth=gateway.auth,
            max_message_bytes=gateway.max_message_bytes,
        )
        self._websocket = WebSocketServer(settings, self.policy, self._telemetry)

    async def start(self) -> None:
        """Listens. The gateway says NOT_SERVING until the action service serves.

        Raises:
            SettingsError: an address cannot be bound, or a certificate cannot be read.
        """
        self.websocket_port = await self._websocket.start()
        logger.info("listening for WebSockets", extra={"port": self.websocket_port})
        await self.server.start()

    async def run_until_stopped(self) -> None:
        """Serves until SIGTERM, SIGINT or `stop`, then finishes what runs."""
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self._action.watch(self._on_change))
                drain = tasks.create_task(self._drain_websocket())
                await self.server.run_until_stopped()
                await drain
                watch.cancel()
        finally:
            await self._action.close()
            self._telemetry.shutdown()

    def stop(self) -> None:
        """Makes `run_until_stopped` stop the gateway and return."""
        self.server.stop()

    async def _on_change(self, ready: bool) -> None:
        await self.server.set_serving(ready)
        if ready:
            logger.info("Service ready (mode=%s, slots=[%s])", "action_only", "action")

    async def _drain_websocket(self) -> None:
        await self.server.wait_stopping()
        await self._websocket.drain()
