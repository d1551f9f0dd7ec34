"""The whole engine as one ASGI application, for hosts that bring their own listener: Modal, uvicorn.

    INFERENCE_CONFIG_PATH=config.json uvicorn --factory openpi_flash_cli.asgi:application

The application's lifespan runs the model services in processes of their own and the gateway in this one. What the
gateway listens on besides (gRPC, WebSocket, the operators' HTTP) is as configured.
"""

import asyncio
import logging
import os
import signal

from openpi_flash_common.logs import setup_logging
from openpi_flash_common.settings import EngineSettings, SettingsError, load_settings
from openpi_flash_gateway.asgi import AsgiServer, Message, Receive, Send
from openpi_flash_gateway.gateway import Gateway

from openpi_flash_cli.serve import service
from openpi_flash_cli.supervisor import Supervisor

logger = logging.getLogger(__name__)


def application(settings: EngineSettings | None = None) -> "Engine":
    """The application.

    Args:
        settings: None: as INFERENCE_CONFIG_PATH and the environment say.

    Raises:
        SettingsError: the settings cannot be used.
    """
    return Engine(settings or load_settings())


class Engine:
    """The application. A robot that connects before all is warm gets its metadata when it is."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._server: AsgiServer | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._server is not None:
            await self._server(scope, receive, send)
        else:
            raise RuntimeError("the host calls the application without its lifespan")

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        setup_logging(self._settings.log, "gateway")
        supervisor = Supervisor([service(slot) for slot in self._settings.slots], handles_signals=False)
        try:
            gateway = Gateway(self._settings, handles_signals=False)
            await gateway.start()
        except SettingsError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        self._server = gateway.asgi()
        services = asyncio.ensure_future(supervisor.run())
        serving = asyncio.ensure_future(gateway.run_until_stopped())
        await send({"type": "lifespan.startup.complete"})
        shutdown = asyncio.ensure_future(receive())
        await asyncio.wait({services, serving, shutdown}, return_when=asyncio.FIRST_COMPLETED)
        if not shutdown.done():  # a service that cannot run at all, which it has said, or the gateway: nor can the rest
            os.kill(os.getpid(), signal.SIGTERM)
            await shutdown
        gateway.stop()
        (of_gateway,) = await asyncio.gather(serving, return_exceptions=True)
        supervisor.stop()
        (of_services,) = await asyncio.gather(services, return_exceptions=True)
        faults = [fault for fault in (of_gateway, of_services) if isinstance(fault, BaseException)]
        for fault in faults:
            logger.error("the engine failed", exc_info=fault)
        if faults:
            await send({"type": "lifespan.shutdown.failed", "message": str(faults[0])})
        else:
            await send({"type": "lifespan.shutdown.complete"})
