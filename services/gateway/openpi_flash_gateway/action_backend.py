"""The action service as the gateway sees it: a pool of long-lived streams, its readiness, and its unary calls."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openpi_flash.v1 import inference_pb2, types_pb2
from openpi_flash_common.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    ServiceError,
    UnavailableError,
    error_from_proto,
    from_rpc_error,
)
from openpi_flash_common.settings import EngineSettings, SettingsError
from openpi_flash_common.telemetry import NO_TRACE, TraceContext

from openpi_flash_gateway import wire

logger = logging.getLogger(__name__)

SERVICE = "openpi_flash.v1.ActionService"

_RETRY_DELAYS_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_METADATA_TIMEOUT_S = 10.0
_ENVELOPE_BYTES = 4096  # what a stream's envelope may add to a request of the largest accepted size
_RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class ActionBackend:
    """Forwards serialized requests to the action service.

    Each stream carries one request at a time. Streams are opened on demand and kept; a request that is given up ends
    its stream, so that the action service drops the work.
    """

    def __init__(self, settings: EngineSettings) -> None:
        """Connects when it is first used.

        Raises:
            SettingsError: no address is configured, or a certificate or key cannot be read.
        """
        gateway = settings.gateway
        self._max_in_flight = gateway.max_in_flight
        self._channel = _channel(settings)
        token = gateway.action_token
        self._call_metadata = (("authorization", f"Bearer {token.get_secret_value()}"),) if token else ()
        self._stream_method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(
            f"/{SERVICE}/InferStream"
        )
        self._idle: list[grpc.aio.StreamStreamCall] = []
        self._in_flight = 0
        self._last_request_id = 0
        self._ready = asyncio.Event()
        self._not_ready_reason = "the action service has not been reached yet"
        self.metadata = inference_pb2.GetMetadataResponse()
        """What the action service said when it last became ready."""

    @property
    def not_ready_reason(self) -> str:
        """Why the action service cannot be used now, for people; empty: it is warm and within reach."""
        return self._not_ready_reason

    async def wait_ready(self) -> None:
        """Returns when the action service is ready."""
        await self._ready.wait()

    async def infer(self, body: wire.Pieces, deadline: float, trace: TraceContext = NO_TRACE) -> memoryview:
        """Has the action service answer a serialized InferRequest; one that gets no answer is tried a second time.

        Args:
            body: the request.
            deadline: on the clock of `time.monotonic`, in seconds.
            trace: sent along.

        Returns:
            The serialized InferResponse.

        Raises:
            ServiceError: the action service's refusal, or why there is no answer.
        """
        if self._not_ready_reason:
            raise UnavailableError(self._not_ready_reason)
        if self._in_flight >= self._max_in_flight:
            raise ResourceExhaustedError(
                f"{self._in_flight} requests are in flight, as many as the gateway accepts; try again later"
            )
        self._in_flight += 1
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                try:
                    return await self._exchange(self._take(), body, deadline, trace)
                except _NoAnswerError as lost:
                    if lost.code not in _RETRYABLE or _is_malformed(body):
                        raise
                    logger.info("no answer from the action service, trying again: %s", lost.error.message)
                return await self._exchange(self._open(), body, deadline, trace)
        except TimeoutError:
            raise DeadlineExceededError("the request's time ran out before the action service had answered") from None
        except _NoAnswerError as lost:
            if _is_malformed(body):
                raise InvalidArgumentError("the request is not a valid openpi_flash.v1.InferRequest") from lost
            raise lost.error from lost
        finally:
            self._in_flight -= 1

    async def call(self, method: str, request: bytes, deadline: float, trace: TraceContext = NO_TRACE) -> bytes:
        """One unary call, serialized in and out.

        Raises:
            ServiceError: what the action service answered, or that it did not.
        """
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            metadata = (*self._call_metadata, *trace.to_metadata())
            return await call(request, timeout=deadline - time.monotonic(), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def watch(self, on_change: Callable[[bool], Awaitable[None]]) -> None:
        """Follows the action service's health until cancelled; says when it becomes ready (True) or unready (False)."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        failures = 0
        while True:
            health = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            try:
                async for update in health:
                    if update.status == health_pb2.HealthCheckResponse.SERVING:
                        failures = 0
                        await self._load_metadata()
                        await self._set_ready("", on_change)
                    else:
                        await self._set_ready("the action service is not serving; it may be warming up", on_change)
                problem = "the action service ended the health watch"
            except grpc.aio.AioRpcError as error:
                problem = f"the action service is out of reach ({error.code().name}: {error.details()})"
            except ServiceError as error:
                problem = f"the action service does not describe itself ({error.code.name}: {error.message})"
            finally:
                health.cancel()
            await self._set_ready(problem, on_change)
            await asyncio.sleep(_RETRY_DELAYS_S[min(failures, len(_RETRY_DELAYS_S) - 1)])
            failures += 1

    async def close(self) -> None:
        """Ends every stream."""
        await self._channel.close()

    async def _exchange(self, call: Any, body: wire.Pieces, deadline: float, trace: TraceContext) -> memoryview:
        self._last_request_id += 1
        request_id = self._last_request_id
        time_left_ms = max(1, round((deadline - time.monotonic()) * 1e3))
        try:
            await call.write(wire.write_stream_request(wire.StreamRequest(request_id, time_left_ms, *trace, body)))
            answer = await call.read()
        except grpc.aio.AioRpcError as error:
            raise _NoAnswerError(error.code(), from_rpc_error(error)) from error
        except asyncio.InvalidStateError as error:  # the stream had ended before the request was written
            raise _NoAnswerError(grpc.StatusCode.UNAVAILABLE, UnavailableError("the stream had ended")) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():  # grpc's way to say that the peer ended the stream so
                lost = UnavailableError("the action service cancelled the stream")
                raise _NoAnswerError(grpc.StatusCode.CANCELLED, lost) from error
            call.cancel()  # out of time or given up: the action service is to drop the work
            raise
        if answer is grpc.aio.EOF:
            raise _NoAnswerError(grpc.StatusCode.UNAVAILABLE, UnavailableError("the action service ended the stream"))
        answered_id, result = wire.read_stream_response(answer)
        if answered_id != request_id:  # never hand a robot another moment's actions
            call.cancel()
            raise InternalError(f"the action service answered request {answered_id} in place of {request_id}")
        self._idle.append(call)
        if isinstance(result, types_pb2.Error):
            raise error_from_proto(result)
        return result

    def _take(self) -> Any:
        while self._idle:
            call = self._idle.pop()
            if not call.done():
                return call
        return self._open()

    def _open(self) -> Any:
        return self._stream_method(metadata=self._call_metadata)

    async def _load_metadata(self) -> None:
        request = inference_pb2.GetMetadataRequest().SerializeToString()
        answer = await self.call("GetMetadata", request, time.monotonic() + _METADATA_TIMEOUT_S)
        self.metadata = inference_pb2.GetMetadataResponse.FromString(answer)

    async def _set_ready(self, problem: str, on_change: Callable[[bool], Awaitable[None]]) -> None:
        if problem == self._not_ready_reason:
            return
        was_ready, self._not_ready_reason = not self._not_ready_reason, problem
        if problem:
            logger.log(logging.WARNING if was_ready else logging.INFO, "%s", problem)
            self._ready.clear()
        else:
            self._ready.set()
        if was_ready or not problem:
            await on_change(not problem)


class _NoAnswerError(Exception):
    """A stream ended before the answer came."""

    def __init__(self, code: grpc.StatusCode, error: ServiceError) -> None:
        super().__init__(error.message)
        self.code = code
        self.error = error


def _is_malformed(body: wire.Pieces) -> bool:
    """Whether the request ends every stream that it is sent on; parsed only when one has ended."""
    try:
        inference_pb2.InferRequest.FromString(b"".join(body))
    except DecodeError:
        return True
    return False


def _channel(settings: EngineSettings) -> grpc.aio.Channel:
    gateway, address = settings.gateway, settings.action_address
    options = [
        ("grpc.max_send_message_length", gateway.max_message_bytes + _ENVELOPE_BYTES),
        ("grpc.max_receive_message_length", gateway.max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),  # a proxy of the environment is meant for the outside
    ]
    if gateway.action_ca_file is None:
        return grpc.aio.insecure_channel(address, options)
    files = (gateway.action_ca_file, gateway.action_client_key_file, gateway.action_client_cert_file)
    try:
        ca, key, certificate = (file.read_bytes() if file is not None else None for file in files)
    except OSError as error:
        raise SettingsError(f"gateway.action_…_file: {error.filename}: {error.strerror}") from error
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate), options)
