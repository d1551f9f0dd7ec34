"""What a transport serves: the interface between robots' protocols and what answers them."""

import abc
import asyncio
import contextlib
import time
from collections.abc import Iterator

from google.protobuf.message import DecodeError
from openpi_flash.v1 import inference_pb2, types_pb2
from openpi_flash_common.errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError
from openpi_flash_common.settings import GatewaySettings
from openpi_flash_common.telemetry import NO_TRACE, TraceContext

from openpi_flash_gateway import wire

_ENCODINGS = {
    "lossless": types_pb2.IMAGE_ENCODING_LOSSLESS,
    "raw": types_pb2.IMAGE_ENCODING_RAW,
    "jpeg": types_pb2.IMAGE_ENCODING_JPEG,
    "png": types_pb2.IMAGE_ENCODING_PNG,
}


class Admission:
    """Counts requests, of all transports and endpoints, and refuses those beyond the limit at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_in_flight = 0

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """A request in flight.

        Raises:
            ResourceExhaustedError: there are as many as there may be.
        """
        if self._num_in_flight >= self._limit:
            raise ResourceExhaustedError(
                f"{self._num_in_flight} requests are in flight, as many as the gateway accepts; try again later"
            )
        self._num_in_flight += 1
        try:
            yield
        finally:
            self._num_in_flight -= 1


class Endpoint(abc.ABC):
    """Answers robots from backends."""

    def __init__(self, settings: GatewaySettings, admission: Admission) -> None:
        self._images = settings.images
        self._default_timeout_s = settings.default_timeout_ms / 1e3
        self._admission = admission
        self._ready = asyncio.Event()

    @property
    @abc.abstractmethod
    def not_ready_reason(self) -> str:
        """Why no request can be answered now, for people; empty: all that is needed is warm and within reach."""

    @abc.abstractmethod
    async def infer(
        self,
        body: wire.Pieces,
        *,
        session_id: str = "",
        timeout_s: float | None = None,
        trace: TraceContext = NO_TRACE,
    ) -> bytes | memoryview:
        """Answers one inference.

        Args:
            body: serialized InferRequest.
            session_id: that of the connection, for a request that names none.
            timeout_s: time that the request may take; None: the configured default.
            trace: where the request stands in its caller's trace.

        Returns:
            The serialized InferResponse.

        Raises:
            ServiceError: there is no answer, and why.
        """

    @abc.abstractmethod
    def forget(self, session_id: str) -> None:
        """Drops what the gateway keeps for a session."""

    @abc.abstractmethod
    def _describe(self) -> inference_pb2.GetMetadataResponse:
        """What the backends say of themselves; may be changed by the caller."""

    @property
    def is_ready(self) -> bool:
        """Whether requests could be answered after the last change."""
        return self._ready.is_set()

    async def wait_ready(self) -> None:
        """Returns when requests can be answered."""
        await self._ready.wait()

    def refresh(self) -> bool:
        """To be called after each change of a backend; whether requests can be answered now."""
        (self._ready.clear if self.not_ready_reason else self._ready.set)()
        return self.is_ready

    async def reset(self, body: bytes, *, timeout_s: float | None = None, trace: TraceContext = NO_TRACE) -> bytes:
        """Forgets a session; a ResetRequest in, a ResetResponse out, both serialized.

        Raises:
            ServiceError: a backend's refusal, or that it did not answer.
        """
        try:
            session_id = inference_pb2.ResetRequest.FromString(body).session_id
        except DecodeError:
            raise InvalidArgumentError("the request is not a valid openpi_flash.v1.ResetRequest") from None
        if not session_id:
            raise InvalidArgumentError("session_id: empty; the session to forget is expected", "session_id")
        self.forget(session_id)
        return inference_pb2.ResetResponse().SerializeToString()

    def metadata(self) -> inference_pb2.GetMetadataResponse:
        """What is served, and how this gateway's operator wants the pictures sent.

        Raises:
            UnavailableError: a backend is not ready.
        """
        self._require_ready()
        answer, images = self._describe(), self._images
        for spec in answer.image_specs:
            spec.encoding = _ENCODINGS[images.encoding]
            spec.jpeg_quality = images.quality if images.encoding == "jpeg" else 0
            spec.jpeg_subsampling = images.subsampling if images.encoding == "jpeg" else ""
        return answer

    def _require_ready(self) -> None:
        if reason := self.not_ready_reason:
            raise UnavailableError(reason)

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._default_timeout_s if timeout_s is None else timeout_s)


def check_mode(mode: int) -> None:
    """Raises an InvalidArgumentError for a number that stands for no mode."""
    if mode not in inference_pb2.Mode.values():
        raise InvalidArgumentError(
            f"mode: {mode} is not one of default (1), subtask_only (2) and action_only (3)", "mode"
        )
