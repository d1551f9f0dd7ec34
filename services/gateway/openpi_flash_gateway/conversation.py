"""openpi's WebSocket protocol, above any listener: one metadata frame, then observations and replies in lock step.

A failed request is answered with a text frame, `CODE: what was wrong`, which openpi's clients raise as an error. After
that the connection is closed with 1011, as openpi does, unless the fault is one that passes (too much load, out of
time, backend away): openpi's client cannot reconnect, so then the connection stays.

A client may come before the backends are warm: it gets its metadata when they are, and until then `/healthz` says 503
and why. A connection is a session, unless an observation names another by `session_id`; `reset` in an observation has
the session forgotten first, since openpi's own client keeps its `reset` to itself. `prev_total_ms` runs from a
request's arrival until its reply is sent; the robot's own pause is not in it.
"""

import abc
import asyncio
import hmac
import http
import secrets
import time
from collections.abc import Iterable
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
from openpi_flash_common.settings import GatewaySettings
from openpi_flash_common.telemetry import Telemetry, TraceContext

from openpi_flash_gateway.endpoint import Endpoint
from openpi_flash_gateway.observation import dict_from_response, request_from_dict

METHOD = "WebSocket/Infer"
"""What WebSocket requests are counted as."""

CLOSE_GOING_AWAY = 1001
CLOSE_FAILED = 1011

SEND_TIMEOUT_S = 10.0
"""After which a robot that reads nothing is cut off."""

WAITING_FRAMES = 2
"""Observations that a client which does not wait for replies may have in memory."""

_PASSING = (ResourceExhaustedError, DeadlineExceededError, UnavailableError)
_MAX_ERROR_LENGTH = 2048
_CONNECTIONS_PER_REQUEST = 4  # robots that may be connected, for each request that may be in flight


class Connection(abc.ABC):
    """One robot's WebSocket, whatever accepts it. Methods raise the listener's own error when the robot is gone.

    A conversation whose robot is gone, or whose connection has been closed, is cancelled by its listener.
    """

    @property
    @abc.abstractmethod
    def headers(self) -> Iterable[tuple[str, str]]:
        """Of the handshake; names in lower case."""

    @abc.abstractmethod
    async def receive(self) -> bytes | str:
        """The next frame."""

    @abc.abstractmethod
    async def send(self, frame: bytes | str) -> None:
        """Sends a frame; cuts off a robot that reads nothing for SEND_TIMEOUT_S."""

    @abc.abstractmethod
    async def close(self, code: int, reason: str) -> None:
        """Ends the connection."""


class Conversations:
    """All connections of one listener. Each is served on its own: none can hold up, or bring down, another."""

    def __init__(self, settings: GatewaySettings, endpoint: Endpoint, telemetry: Telemetry) -> None:
        """
        Raises:
            SettingsError: tokens are asked for, and there is none.
        """
        self._max_connections = settings.max_in_flight * _CONNECTIONS_PER_REQUEST
        self._tokens = settings.auth.load_tokens() if settings.auth is not None else None
        self._endpoint = endpoint
        self._telemetry = telemetry
        self._waiting: set[Connection] = set()  # without a request in flight
        self._num_connections = 0
        self._draining = False
        self._all_ended = asyncio.Event()

    def plain_answer(self, path: str, headers: Iterable[tuple[str, str]]) -> tuple[http.HTTPStatus, str] | None:
        """What a handshake, or a request without one, is answered in place of a conversation; None: come in.

        Args:
            headers: names in lower case.
        """
        if path == "/healthz":
            if reason := self._endpoint.not_ready_reason:
                return http.HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n"
            return http.HTTPStatus.OK, "OK\n"
        sent = [value for name, value in headers if name == "authorization"]
        if self._tokens is not None and not _is_authorized(sent, self._tokens):
            return (
                http.HTTPStatus.UNAUTHORIZED,
                "a valid token is required (Authorization: Bearer … or Api-Key …)\n",
            )
        if self._draining:
            return http.HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping\n"
        if self._num_connections >= self._max_connections:
            return (
                http.HTTPStatus.SERVICE_UNAVAILABLE,
                f"{self._num_connections} robots are connected; no more can be\n",
            )
        return None

    async def converse(self, connection: Connection) -> None:
        """Serves one connection until it ends; cancelled, it gives up the request in flight."""
        self._num_connections += 1
        session_id = f"websocket-{secrets.token_hex(8)}"
        try:
            if not self._draining:  # as it may since the handshake
                trace = TraceContext.from_metadata(connection.headers)
                self._waiting.add(connection)
                await self._endpoint.wait_ready()
                await connection.send(openpi_msgpack.packb(_policy_metadata(self._endpoint.metadata())))
                await self._answer_all(connection, trace, session_id)
        finally:
            self._num_connections -= 1
            self._waiting.discard(connection)
            self._endpoint.forget(session_id)
            if self._draining and not self._num_connections:
                self._all_ended.set()

    async def drain(self) -> None:
        """Closes what waits with 1001; what is in flight is answered, and closed after that. Returns when all
        conversations have ended."""
        self._draining = True
        if self._num_connections:
            waiting = tuple(self._waiting)
            await asyncio.gather(*(connection.close(CLOSE_GOING_AWAY, "server stops") for connection in waiting))
            await self._all_ended.wait()

    async def _answer_all(self, connection: Connection, trace: TraceContext, session_id: str) -> None:
        last_total_ms: float | None = None
        while not self._draining:
            self._waiting.add(connection)
            message = await connection.receive()
            self._waiting.discard(connection)
            start = time.perf_counter()
            try:
                with self._telemetry.request(METHOD, trace) as span:
                    reply = await self._answer(message, session_id, span.context, last_total_ms)
            except Exception as error:
                fault = to_service_error(error)
                await connection.send(f"{fault.code.name}: {fault.message}"[:_MAX_ERROR_LENGTH])
                if not isinstance(fault, _PASSING):
                    await connection.close(CLOSE_FAILED, "Request failed; the frame before says why.")
                    return
            else:
                await connection.send(reply)
                last_total_ms = (time.perf_counter() - start) * 1e3
        await connection.close(CLOSE_GOING_AWAY, "server stops")

    async def _answer(
        self, message: bytes | str, session_id: str, trace: TraceContext, last_total_ms: float | None
    ) -> bytes:
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
