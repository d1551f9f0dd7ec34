"""openpi's WebSocket protocol: one metadata frame, then binary observations and binary replies in lock step.

A failed request is answered with a text frame, `CODE: what was wrong`, which openpi's clients raise as an error. After
that the connection is closed with 1011, as openpi does, unless the fault is one that passes (too much load, out of
time, backend away): openpi's client cannot reconnect, so then the connection stays.

A client may come before the backends are warm: it gets its metadata when they are, and until then `/healthz` says 503
and why. A connection is a session, unless an observation names another by `session_id`; `reset` in an observation has
the session forgotten first, since openpi's own client keeps its `reset` to itself. `prev_total_ms` runs from a
request's arrival until its reply is sent; the robot's own pause is not in it.
"""

import asyncio
import hmac
import http
import logging
import secrets
import ssl
import time
from typing import Any

from google.protobuf.json_format import MessageToDict
from openpi_flash.v1 import inference_pb2
from openpi_flash_common import openpi_msgpack
from openpi_flash_common.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
    to_service_error,
)
from openpi_flash_common.settings import GatewaySettings, SettingsError, TlsSettings
from openpi_flash_common.telemetry import Telemetry, TraceContext
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Data

from openpi_flash_gateway.endpoint import Endpoint
from openpi_flash_gateway.observation import dict_from_response, request_from_dict

METHOD = "WebSocket/Infer"
"""What WebSocket requests are counted as."""

_PASSING = (ResourceExhaustedError, DeadlineExceededError, UnavailableError)
_MAX_ERROR_LENGTH = 2048
_OPEN_TIMEOUT_S = 10.0
_SEND_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0
_WAITING_FRAMES = 2  # observations that a client which does not wait for replies may have in memory
_CONNECTIONS_PER_REQUEST = 4  # robots that may be connected, for each request that may be in flight

logger = logging.getLogger(__name__)
# Its errors are failed handshakes, port scanners' for example, with a traceback each.
_protocol_logger = logging.getLogger(f"{__name__}.protocol")
_protocol_logger.setLevel(logging.CRITICAL)


class WebSocketServer:
    """The listener. Each connection is served on its own: none can hold up, or bring down, another."""

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
        self._max_connections = settings.max_in_flight * _CONNECTIONS_PER_REQUEST
        self._tls = settings.tls
        self._tokens = settings.auth.load_tokens() if settings.auth is not None else None
        self._endpoint = endpoint
        self._telemetry = telemetry
        self._server: Server | None = None
        self._waiting: set[ServerConnection] = set()  # connections without a request in flight
        self._num_connections = 0
        self._draining = False

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
                max_queue=_WAITING_FRAMES,
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
        """Accepts nothing new, answers what is in flight, and closes the connections with 1001."""
        if self._server is None:
            return
        self._draining = True
        self._server.close(close_connections=False)
        await asyncio.gather(*(connection.close(1001, "server stops") for connection in tuple(self._waiting)))
        await self._server.wait_closed()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/healthz":
            if reason := self._endpoint.not_ready_reason:
                return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n")
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self._tokens is not None and not _is_authorized(request.headers.get_all("Authorization"), self._tokens):
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED, "a valid token is required (Authorization: Bearer … or Api-Key …)\n"
            )
        if self._num_connections >= self._max_connections:
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE, f"{self._num_connections} robots are connected; no more can be\n"
            )
        return None

    async def _serve(self, connection: ServerConnection) -> None:
        self._num_connections += 1
        # A client that goes away while its request is in flight cancels the request.
        task = asyncio.current_task()
        gone = asyncio.ensure_future(connection.wait_closed())

        def give_up(_: asyncio.Future[None]) -> None:
            if task:
                task.cancel()

        gone.add_done_callback(give_up)
        try:
            await self._converse(connection)
        except (ConnectionClosed, asyncio.CancelledError):
            pass  # nobody is left to tell
        except Exception:
            logger.exception("a WebSocket connection failed")
        finally:
            self._num_connections -= 1
            self._waiting.discard(connection)
            gone.remove_done_callback(give_up)
            gone.cancel()
            if task:
                task.uncancel()

    async def _converse(self, connection: ServerConnection) -> None:
        request = connection.request
        assert request is not None  # noqa: S101 - the handshake is over
        trace = TraceContext.from_metadata((name.lower(), value) for name, value in request.headers.raw_items())
        self._waiting.add(connection)
        await self._endpoint.wait_ready()
        await _send(connection, openpi_msgpack.packb(_policy_metadata(self._endpoint.metadata())))
        session_id = f"websocket-{secrets.token_hex(8)}"
        try:
            await self._answer_all(connection, trace, session_id)
        finally:
            self._endpoint.forget(session_id)

    async def _answer_all(self, connection: ServerConnection, trace: TraceContext, session_id: str) -> None:
        last_total_ms: float | None = None
        while not self._draining:
            self._waiting.add(connection)
            message = await connection.recv()
            self._waiting.discard(connection)
            start = time.perf_counter()
            try:
                with self._telemetry.request(METHOD, trace) as span:
                    reply = await self._answer(message, session_id, span.context, last_total_ms)
            except Exception as error:
                fault = to_service_error(error)
                await _send(connection, f"{fault.code.name}: {fault.message}"[:_MAX_ERROR_LENGTH])
                if not isinstance(fault, _PASSING):
                    await connection.close(1011, "Request failed; the frame before says why.")
                    return
            else:
                await _send(connection, reply)
                last_total_ms = (time.perf_counter() - start) * 1e3
        await connection.close(1001, "server stops")

    async def _answer(self, message: Data, session_id: str, trace: TraceContext, last_total_ms: float | None) -> bytes:
        metrics = self._telemetry.metrics
        metrics.received_bytes.labels(METHOD).inc(len(message))
        if isinstance(message, str):
            raise InvalidArgumentError("a text frame; an observation is a binary frame of msgpack")
        request, is_reset = request_from_dict(openpi_msgpack.unpackb(message))
        start = time.perf_counter()
        if is_reset:
            reset = inference_pb2.ResetRequest(session_id=request.session_id or session_id)
            await self._endpoint.reset(reset.SerializeToString(), trace=trace)
        answer = await self._endpoint.infer([request.SerializeToString()], session_id=session_id, trace=trace)
        result = dict_from_response(inference_pb2.InferResponse.FromString(bytes(answer)))
        result["server_timing"] = {"infer_ms": (time.perf_counter() - start) * 1e3}
        if last_total_ms is not None:
            result["server_timing"]["prev_total_ms"] = last_total_ms
        reply = openpi_msgpack.packb(result)
        metrics.sent_bytes.labels(METHOD).inc(len(reply))
        return reply


async def _send(connection: ServerConnection, message: Data) -> None:
    """Sends, or cuts off a client that reads nothing for too long."""
    try:
        async with asyncio.timeout(_SEND_TIMEOUT_S):
            await connection.send(message)
    except TimeoutError:
        logger.warning("a robot reads nothing; its connection is cut off")
        connection.transport.abort()
        raise ConnectionClosed(None, None) from None


def _policy_metadata(metadata: inference_pb2.GetMetadataResponse) -> dict[str, Any]:
    """openpi's metadata map. A Struct knows only doubles: whole numbers become integers again, as openpi has them."""
    return _with_integers(MessageToDict(metadata.policy_metadata))


def _with_integers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_integers(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_with_integers(element) for element in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_authorized(headers: list[str], tokens: frozenset[str]) -> bool:
    sent = [header.split(" ", 1) for header in headers]
    given = [parts[1].strip() for parts in sent if len(parts) == 2 and parts[0].lower() in ("bearer", "api-key")]
    # Every token is compared, each in constant time: neither which nor how much of one matched can be timed.
    return sum(hmac.compare_digest(text.encode(), token.encode()) for text in given for token in tokens) > 0


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
