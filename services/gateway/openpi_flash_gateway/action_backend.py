"""The action service as the gateway sees it: replicas, each with a pool of long-lived streams, each of these with one
request in flight."""

import asyncio
import logging
import time
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from openpi_flash.v1 import inference_pb2, types_pb2
from openpi_flash_common.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ServiceError,
    UnavailableError,
    error_from_proto,
    from_rpc_error,
)
from openpi_flash_common.settings import GatewaySettings
from openpi_flash_common.telemetry import NO_TRACE, TraceContext

from openpi_flash_gateway import wire
from openpi_flash_gateway.backend import Access, is_given_up
from openpi_flash_gateway.replicas import Replica, Replicas

logger = logging.getLogger(__name__)

SERVICE = "openpi_flash.v1.ActionService"

_RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class ActionReplica(Replica[inference_pb2.GetMetadataResponse]):
    """One policy on one accelerator.

    Streams are opened on demand and kept; a request that is given up ends its stream, so that the action service drops
    the work.
    """

    def __init__(self, settings: GatewaySettings, address: str, host: str, access: Access) -> None:
        """Takes what a Replica does."""
        metadata = ("GetMetadata", inference_pb2.GetMetadataResponse)
        super().__init__(
            "action service",
            SERVICE,
            address,
            access,
            metadata,
            max_message_bytes=settings.max_message_bytes,
            host=host,
        )
        self._stream_method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(
            f"/{SERVICE}/InferStream"
        )
        self._idle: list[grpc.aio.StreamStreamCall] = []
        self._last_request_id = 0

    async def infer(
        self, body: wire.Pieces, deadline: float, trace: TraceContext, *, on_new_stream: bool = False
    ) -> memoryview:
        """A serialized InferRequest to an InferResponse.

        Raises:
            ServiceError: the action service's refusal.
            _NoAnswerError: a stream ended before the answer came.
        """
        with self.busy():
            return await self._exchange(self._open() if on_new_stream else self._take(), body, deadline, trace)

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
            if is_given_up():  # or out of time: the action service is to drop the work
                call.cancel()
                raise
            lost = UnavailableError(f"the connection to the {self.name} was closed")
            raise _NoAnswerError(grpc.StatusCode.CANCELLED, lost) from error
        if answer is grpc.aio.EOF:
            raise _NoAnswerError(grpc.StatusCode.UNAVAILABLE, UnavailableError("the action service ended the stream"))
        try:
            answered_id, result = wire.read_stream_response(answer)
        except DecodeError as error:
            call.cancel()
            raise InternalError(f"the {self.name} did not answer with an InferStreamResponse") from error
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
        try:
            return self._stream_method(metadata=self._call_metadata)
        except grpc.aio.UsageError as error:
            raise _NoAnswerError(grpc.StatusCode.UNAVAILABLE, self.closed_error()) from error


class _NoAnswerError(Exception):
    """A stream ended before the answer came."""

    def __init__(self, code: grpc.StatusCode, error: ServiceError) -> None:
        super().__init__(error.message)
        self.code = code
        self.error = error


class ActionBackend(Replicas[ActionReplica, inference_pb2.GetMetadataResponse]):
    """All replicas of the action service. They are alike: it does not matter to a robot which of them answers."""

    def __init__(self, settings: GatewaySettings, addresses: str) -> None:
        """Describes the replicas, as Replicas do."""
        super().__init__(
            "action service",
            "gateway.action.address",
            addresses,
            settings.action,
            lambda address, host, access: ActionReplica(settings, address, host, access),
            metadata=inference_pb2.GetMetadataResponse(),
        )

    async def infer(self, body: wire.Pieces, deadline: float, trace: TraceContext = NO_TRACE) -> memoryview:
        """Has a replica answer a serialized InferRequest; one that gets no answer is tried a second time, by another
        replica where there is one.

        Args:
            body: the request.
            deadline: on the clock of `time.monotonic`, in seconds.
            trace: sent along.

        Returns:
            The serialized InferResponse.

        Raises:
            ServiceError: the action service's refusal, or why there is no answer.
        """
        replica = self.pick()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                try:
                    return await replica.infer(body, deadline, trace)
                except _NoAnswerError as lost:
                    if lost.code not in _RETRYABLE or _is_malformed(body):
                        raise
                    logger.info("no answer from the %s, trying again: %s", replica.name, lost.error.message)
                return await self.pick(other_than=replica).infer(body, deadline, trace, on_new_stream=True)
        except TimeoutError:
            raise DeadlineExceededError("the request's time ran out before the action service had answered") from None
        except _NoAnswerError as lost:
            if _is_malformed(body):
                raise InvalidArgumentError("the request is not a valid openpi_flash.v1.InferRequest") from lost
            raise lost.error from lost

    async def reset(self, request: bytes, deadline: float, trace: TraceContext = NO_TRACE) -> bytes:
        """Has every ready replica forget a session, a serialized ResetRequest; returns a ResetResponse. Raises
        ServiceErrors."""
        replicas = self.ready or (self.pick(),)
        return (await asyncio.gather(*(replica.call("Reset", request, deadline, trace) for replica in replicas)))[0]


def _is_malformed(body: wire.Pieces) -> bool:
    """Whether the request ends every stream that it is sent on; parsed only when one has ended."""
    try:
        inference_pb2.InferRequest.FromString(b"".join(body))
    except DecodeError:
        return True
    return False
