"""The gRPC server of every service: health, reflection, limits, TLS, tokens, errors, telemetry and a clean stop."""

import asyncio
import contextlib
import hmac
import inspect
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from openpi_flash_common.errors import UnauthenticatedError, UnavailableError, abort
from openpi_flash_common.settings import AuthSettings, SettingsError, TlsSettings
from openpi_flash_common.telemetry import Telemetry, TraceContext

logger = logging.getLogger(__name__)

LIVENESS = "liveness"
"""Name under which health is SERVING from the start of the server to its stop, whether or not requests can be answered:
for those who would restart a process that does not answer at all."""

_CUT_OFF_TIMEOUT_S = 5.0

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a lottery
    # Robots may ping every 5 s, idle connections included; faster ones are told to calm down and cut off.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # A peer that vanished is noticed, and its streams freed, within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_metadata_size", 16 << 10),
)


class GrpcServer:
    """One asyncio gRPC server.

    Health of every service, and overall, is NOT_SERVING until `set_serving`, that of LIVENESS is SERVING; health checks
    need no token. Handlers
    raise ServiceErrors, which become statuses here. Requests that a handler works on are counted, so that a stop can
    wait for them: unary calls by themselves, requests on streams through `lock_step`.

    Attributes:
        ports: bound TCP ports, in the order of the addresses (0 for a Unix socket); known after `start`.
    """

    def __init__(
        self,
        services: Mapping[str, Callable[[grpc.aio.Server], None]],
        addresses: Sequence[str],
        telemetry: Telemetry,
        *,
        tls: TlsSettings | None = None,
        auth: AuthSettings | None = None,
        max_message_bytes: int = 64 << 20,
        max_concurrent_rpcs: int = 1024,
        drain_seconds: float = 30.0,
        handles_signals: bool = True,
    ) -> None:
        """Describes a server; nothing listens yet.

        Args:
            services: full service name, e.g. `openpi_flash.v1.ActionService`, to what registers its handlers: generated
                `add_…_to_server` with its servicer bound, or generic handlers of raw bytes.
            addresses: `host:port` (port 0: any free one) or `unix:/path`. TLS is for TCP; a Unix socket is protected by
                its file mode, 0600.
            drain_seconds: how long a stop waits for requests in flight.
            handles_signals: False for a second server of the process, which the first one's stop is to stop.
        """
        self.ports: list[int] = []
        self._services = dict(services)
        self._addresses = tuple(addresses)
        self._telemetry = telemetry
        self._tls = tls
        self._tokens = auth.load_tokens() if auth is not None else None
        self._max_message_bytes = max_message_bytes
        self._max_concurrent_rpcs = max_concurrent_rpcs
        self._drain_seconds = drain_seconds
        self._handles_signals = handles_signals
        self._health = health.aio.HealthServicer()
        self._activity = _Activity()
        self._stop = asyncio.Event()

    async def start(self) -> None:
        """Listens. SIGTERM and SIGINT, if handled, end `run_until_stopped`; a second one ends the process at once.

        Raises:
            SettingsError: an address cannot be bound, or a certificate cannot be read.
        """
        self._server = grpc.aio.server(
            interceptors=[_Interceptor(self._services, self._tokens, self._telemetry, self._activity)],
            options=[
                *_OPTIONS,
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.max_send_message_length", self._max_message_bytes),
            ],
            maximum_concurrent_rpcs=self._max_concurrent_rpcs,
        )
        for register in self._services.values():
            register(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        await self.set_serving(False)
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        self.ports = [self._bind(address) for address in self._addresses]
        for number in (signal.SIGTERM, signal.SIGINT) if self._handles_signals else ():
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        await self._server.start()
        for address, port in zip(self._addresses, self.ports, strict=True):
            bound = f"{address.rpartition(':')[0]}:{port}" if port else address
            logger.info("listening", extra={"address": bound})

    async def set_serving(self, serving: bool) -> None:
        """Says whether requests can be answered. The server refuses nothing by itself: that is up to the handlers."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, status)

    def stop(self) -> None:
        """Makes `run_until_stopped` stop the server and return."""
        self._stop.set()

    async def wait_stopping(self) -> None:
        """Returns when a stop has begun, for what is to be drained beside this server."""
        await self._stop.wait()

    async def run_until_stopped(self) -> None:
        """Serves until SIGTERM, SIGINT or `stop`; then says NOT_SERVING, accepts nothing new, finishes what runs."""
        await self._stop.wait()
        await self._drain()

    async def lock_step(self, context: grpc.aio.ServicerContext, answer: Callable[[Any], Awaitable[Any]]) -> None:
        """Answers the requests of a stream in order, one at a time, until the client ends it.

        While the server drains, the stream ends between two requests, with UNAVAILABLE.

        Args:
            answer: from a request to its response; it turns errors of the request into responses.
        """
        while not self._activity.draining:
            with self._activity.idle():
                request = await context.read()
            if request is grpc.aio.EOF:
                return
            with self._activity.busy():
                await context.write(await answer(request))
        raise UnavailableError("the server is stopping")

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            logger.warning("second signal: exiting at once")
            os._exit(128 + number)
        logger.info("stopping", extra={"signal": signal.Signals(number).name})
        self._stop.set()

    async def _drain(self) -> None:
        await self._health.enter_graceful_shutdown()
        # Refuses what is new at once; the calls that run get their time.
        stopping = asyncio.ensure_future(self._server.stop(self._drain_seconds))
        finished = await self._activity.drain(self._drain_seconds)
        if not finished:
            logger.warning("giving up on requests in flight", extra={"drain_s": self._drain_seconds})
        # Lets the last answers and statuses leave. What is still open then, such as health watchers, is cut off.
        ended, _ = await asyncio.wait({stopping}, timeout=0.5)
        if not ended:
            # Not for ever: under load gRPC has been seen, rarely, not to say that it had stopped.
            cut_off = asyncio.ensure_future(self._server.stop(None))
            ended, _ = await asyncio.wait({stopping, cut_off}, timeout=_CUT_OFF_TIMEOUT_S)
            if not ended:
                logger.warning("gRPC does not end", extra={"waited_s": _CUT_OFF_TIMEOUT_S})

    def _bind(self, address: str) -> int:
        is_unix = address.startswith("unix:")
        try:
            if self._tls is None or is_unix:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, _server_credentials(self._tls))
        except RuntimeError as error:
            raise SettingsError(f"cannot listen on {address}: is it taken by another process?") from error
        if is_unix:
            Path(address.removeprefix("unix:")).chmod(0o600)
            return 0
        return port


class _Activity:
    """What a stop waits for: requests in flight. Streams between two requests are interrupted instead."""

    def __init__(self) -> None:
        self.draining = False
        self._in_flight = 0
        self._idle: set[asyncio.Task[Any]] = set()
        self._done = asyncio.Event()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            if self.draining and not self._in_flight:
                self._done.set()

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - handlers run in tasks
        self._idle.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task in self._idle:
                raise
            raise UnavailableError("the server is stopping") from None
        finally:
            self._idle.discard(task)

    async def drain(self, seconds: float) -> bool:
        """Interrupts idle streams and waits for what is in flight; false: it took too long."""
        self.draining = True
        for task in tuple(self._idle):
            self._idle.discard(task)
            task.cancel()
        if not self._in_flight:
            return True
        try:
            await asyncio.wait_for(self._done.wait(), seconds)
        except TimeoutError:
            return False
        return True


class _Interceptor(grpc.aio.ServerInterceptor):
    """Wraps each handler: token, telemetry, count of requests in flight, errors to statuses."""

    def __init__(
        self, services: Mapping[str, Any], tokens: frozenset[str] | None, telemetry: Telemetry, activity: _Activity
    ) -> None:
        self._services = services
        self._accepted = None if tokens is None else tuple(f"Bearer {token}".encode() for token in tokens)
        self._telemetry = telemetry
        self._activity = activity
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        method: str = details.method
        service = method.split("/")[1]
        if handler is None or service == health.SERVICE_NAME:
            return handler
        if not self._is_authorized(details.invocation_metadata):
            return _with_behaviour(handler, _refuse)
        if service not in self._services:
            return handler  # reflection
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            wrapped = self._wrapped[method] = self._wrap(handler, method)
        return wrapped

    def _is_authorized(self, metadata: Any) -> bool:
        if self._accepted is None:
            return True
        sent = next((value for key, value in metadata or () if key == "authorization"), "")
        sent = sent if isinstance(sent, bytes) else sent.encode(errors="replace")
        # Every token is compared, each in constant time: neither which nor how much of one matched can be timed.
        return sum(hmac.compare_digest(sent, token) for token in self._accepted) > 0

    def _wrap(self, handler: Any, method: str) -> Any:
        name = method.rpartition(".")[2]  # `ActionService/Infer`
        telemetry, activity = self._telemetry, self._activity

        if handler.response_streaming:
            behaviour = handler.stream_stream or handler.unary_stream

            async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
                try:
                    result = behaviour(request, context)
                    if inspect.isasyncgen(result):
                        with (
                            activity.busy(),
                            telemetry.request(name, TraceContext.from_metadata(context.invocation_metadata())),
                        ):
                            async with contextlib.aclosing(result):  # a call that is given up ends its work at once
                                async for response in result:
                                    await context.write(response)
                    else:
                        await result
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    await abort(context, error)

        else:
            behaviour = handler.unary_unary or handler.stream_unary

            async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
                try:
                    with (
                        activity.busy(),
                        telemetry.request(name, TraceContext.from_metadata(context.invocation_metadata())),
                    ):
                        return await behaviour(request, context)
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    await abort(context, error)

        if not telemetry.metrics.enabled:
            return _with_behaviour(handler, call, handler.request_deserializer, handler.response_serializer)
        return _with_behaviour(
            handler,
            call,
            _counting_input(handler.request_deserializer, telemetry.metrics.received_bytes.labels(name)),
            _counting_output(handler.response_serializer, telemetry.metrics.sent_bytes.labels(name)),
        )


async def _refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
    await abort(context, UnauthenticatedError("a valid bearer token is required (metadata: authorization: Bearer …)"))


def _with_behaviour(
    handler: Any,
    behaviour: Callable[..., Awaitable[Any]],
    deserialize: Callable[[bytes], Any] | None = None,
    serialize: Callable[[Any], bytes] | None = None,
) -> Any:
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(behaviour, request_deserializer=deserialize, response_serializer=serialize)


def _counting_input(deserialize: Callable[[bytes], Any] | None, counter: Any) -> Callable[[bytes], Any]:
    def count(data: bytes) -> Any:
        counter.inc(len(data))
        return deserialize(data) if deserialize is not None else data

    return count


def _counting_output(serialize: Callable[[Any], bytes] | None, counter: Any) -> Callable[[Any], bytes]:
    def count(message: Any) -> bytes:
        data = serialize(message) if serialize is not None else message
        counter.inc(len(data))
        return data

    return count


def _server_credentials(tls: TlsSettings) -> grpc.ServerCredentials:
    def read(name: str, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise SettingsError(f"tls.{name}: {path}: {error.strerror}") from error

    pair = (read("key_file", tls.key_file), read("cert_file", tls.cert_file))
    client_ca = read("client_ca_file", tls.client_ca_file) if tls.client_ca_file is not None else None
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)
