"""The WebSocket port: a listener of its own for the conversations of `conversation.py`."""

import asyncio
import logging
import ssl
from collections.abc import Iterable

from openpi_flash_common.settings import GatewaySettings, SettingsError, TlsSettings
from openpi_flash_common.telemetry import Telemetry
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from openpi_flash_gateway import conversation
from openpi_flash_gateway.conversation import Connection, Conversations
from openpi_flash_gateway.endpoint import Endpoint

_OPEN_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)
# Its errors are failed handshakes, port scanners' for example, with a traceback each.
_protocol_logger = logging.getLogger(f"{__name__}.protocol")
_protocol_logger.setLevel(logging.CRITICAL)


class WebSocketServer:
    """The listener."""

    def __init__(
        self, settings: GatewaySettings, endpoint: Endpoint, telemetry: Telemetry, slot: str, port: int
    ) -> None:
        """
        Args:
            slot: `action` or `planner`, for errors.
            port: TCP port; 0: any free one.
        """
        self._slot, self._host, self._port = slot, settings.host, port
        self._max_message_bytes = settings.max_message_bytes
        self._tls = settings.tls
        self._conversations = Conversations(settings, endpoint, telemetry)
        self._server: Server | None = None

    async def start(self) -> int:
        """Listens; returns the bound port.

        Raises:
            SettingsError: the port cannot be bound, or a certificate cannot be read.
        """
        try:
            self._server = await serve(
                self._serve,
                self._host,
                self._port,
                process_request=self._admit,
                ssl=_ssl_context(self._tls) if self._tls is not None else None,
                compression=None,
                max_size=self._max_message_bytes,
                max_queue=conversation.WAITING_FRAMES,
                open_timeout=_OPEN_TIMEOUT_S,
                close_timeout=_CLOSE_TIMEOUT_S,
                logger=_protocol_logger,
                server_header="openpi-flash",
            )
        except OSError as error:
            raise SettingsError(
                f"{self._slot}_transport.websocket_port: cannot listen on {self._host}:{self._port}: {error.strerror}"
            ) from error
        return next(iter(self._server.sockets)).getsockname()[1]

    async def drain(self) -> None:
        """Accepts nothing new, and returns when all conversations have ended, as Conversations.drain says."""
        if self._server is None:
            return
        self._server.close(close_connections=False)
        await self._conversations.drain()
        await self._server.wait_closed()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        answer = self._conversations.plain_answer(request.path, _lower(request))
        return None if answer is None else connection.respond(*answer)

    async def _serve(self, connection: ServerConnection) -> None:
        # A client that goes away while its request is in flight cancels the request.
        task = asyncio.current_task()
        gone = asyncio.ensure_future(connection.wait_closed())

        def give_up(_: asyncio.Future[None]) -> None:
            if task:
                task.cancel()

        gone.add_done_callback(give_up)
        try:
            await self._conversations.converse(_Connection(connection))
        except (ConnectionClosed, asyncio.CancelledError):
            pass  # nobody is left to tell
        except Exception:
            logger.exception("a WebSocket connection failed")
        finally:
            gone.remove_done_callback(give_up)
            gone.cancel()
            if task:
                task.uncancel()


class _Connection(Connection):
    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection

    @property
    def headers(self) -> Iterable[tuple[str, str]]:
        request = self._connection.request
        assert request is not None  # noqa: S101 - the handshake is over
        return _lower(request)

    async def receive(self) -> bytes | str:
        return await self._connection.recv()

    async def send(self, frame: bytes | str) -> None:
        try:
            async with asyncio.timeout(conversation.SEND_TIMEOUT_S):
                await self._connection.send(frame)
        except TimeoutError:
            logger.warning("a robot reads nothing; its connection is cut off")
            self._connection.transport.abort()
            raise ConnectionClosed(None, None) from None

    async def close(self, code: int, reason: str) -> None:
        await self._connection.close(code, reason)


def _lower(request: Request) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in request.headers.raw_items()]


def _ssl_context(tls: TlsSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file)
        if tls.client_ca_file is not None:
            context.load_verify_locations(tls.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"gateway.tls: a certificate or key cannot be read: {error}") from error
    return context
