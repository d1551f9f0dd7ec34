"""The conversations of `conversation.py` as an ASGI application, for hosts that bring their own listener."""

import asyncio
import http
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from openpi_flash_common.settings import GatewaySettings
from openpi_flash_common.telemetry import Telemetry

from openpi_flash_gateway import conversation
from openpi_flash_gateway.conversation import CLOSE_FAILED, CLOSE_GOING_AWAY, Connection, Conversations
from openpi_flash_gateway.endpoint import Endpoint

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_CLOSE_TOO_BIG = 1009
_CLOSE_REFUSED = 1008

logger = logging.getLogger(__name__)


class AsgiServer:
    """The application: WebSocket on any path, `/healthz` over HTTP. It takes no part in ASGI's lifespan."""

    def __init__(self, settings: GatewaySettings, endpoint: Endpoint, telemetry: Telemetry) -> None:
        self._max_message_bytes = settings.max_message_bytes
        self._conversations = Conversations(settings, endpoint, telemetry)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        answer = self._conversations.plain_answer(scope["path"], headers)
        if scope["type"] == "http":
            status, text = answer or (http.HTTPStatus.UPGRADE_REQUIRED, "robots connect here by WebSocket\n")
            await _respond(send, "http.response", status, text)
        elif scope["type"] == "websocket":
            await receive()  # websocket.connect
            if answer is None:
                await send({"type": "websocket.accept"})
                await self._serve(headers, receive, send)
            elif "websocket.http.response" in (scope.get("extensions") or {}):
                await _respond(send, "websocket.http.response", *answer)
            else:
                await send({"type": "websocket.close", "code": _CLOSE_REFUSED, "reason": answer[1].strip()})

    async def drain(self) -> None:
        """Refuses what is new, and returns when all conversations have ended, as Conversations.drain says."""
        await self._conversations.drain()

    async def _serve(self, headers: list[tuple[str, str]], receive: Receive, send: Send) -> None:
        connection = _Connection(headers, send)
        conversing = asyncio.ensure_future(self._conversations.converse(connection))
        reading = asyncio.ensure_future(self._read(receive, connection))
        try:
            # A client that goes away while its request is in flight cancels the request.
            await asyncio.wait({conversing, reading, connection.closed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            conversing.cancel()
            reading.cancel()
            faults = await asyncio.gather(conversing, reading, return_exceptions=True)
            unexpected = [fault for fault in faults if isinstance(fault, Exception) and not isinstance(fault, OSError)]
            for fault in unexpected:
                logger.error("a WebSocket connection failed", exc_info=fault)
            await connection.close(CLOSE_FAILED if unexpected else CLOSE_GOING_AWAY, "")

    async def _read(self, receive: Receive, connection: "_Connection") -> None:
        """Hands frames over until the client is gone."""
        while (message := await receive())["type"] == "websocket.receive":
            frame = message["bytes"] if message.get("bytes") is not None else message["text"]
            if len(frame) > self._max_message_bytes:
                await connection.close(_CLOSE_TOO_BIG, f"at most {self._max_message_bytes} bytes")
                return
            await connection.frames.put(frame)
        connection.open = False


class _Connection(Connection):
    def __init__(self, headers: Iterable[tuple[str, str]], send: Send) -> None:
        self._headers = headers
        self._send = send
        self.frames: asyncio.Queue[bytes | str] = asyncio.Queue(conversation.WAITING_FRAMES)
        self.open = True
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def headers(self) -> Iterable[tuple[str, str]]:
        return self._headers

    async def receive(self) -> bytes | str:
        return await self.frames.get()

    async def send(self, frame: bytes | str) -> None:
        try:
            async with asyncio.timeout(conversation.SEND_TIMEOUT_S):
                await self._send({"type": "websocket.send", "text" if isinstance(frame, str) else "bytes": frame})
        except TimeoutError:
            logger.warning("a robot reads nothing; its connection is cut off")
            raise ConnectionAbortedError("the robot reads nothing") from None

    async def close(self, code: int, reason: str) -> None:
        if not self.open:
            return
        self.open = False
        try:
            async with asyncio.timeout(conversation.SEND_TIMEOUT_S):
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
        except (OSError, TimeoutError):
            pass  # it is gone
        self.closed.set_result(None)


async def _respond(send: Send, kind: str, status: http.HTTPStatus, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": f"{kind}.start", "status": int(status), "headers": headers})
    await send({"type": f"{kind}.body", "body": text.encode()})
