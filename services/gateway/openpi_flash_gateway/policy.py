"""The path of a request through the gateway, the same for every transport: mode, deadline, backends."""

import time

from openpi_flash.v1 import inference_pb2, types_pb2
from openpi_flash_common.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from openpi_flash_common.settings import GatewaySettings, ImageSettings
from openpi_flash_common.telemetry import NO_TRACE, TraceContext

from openpi_flash_gateway import wire
from openpi_flash_gateway.action_backend import ActionBackend

_ENCODINGS = {
    "raw": types_pb2.IMAGE_ENCODING_RAW,
    "jpeg": types_pb2.IMAGE_ENCODING_JPEG,
    "png": types_pb2.IMAGE_ENCODING_PNG,
}


class Policy:
    """Answers robots from the configured backends."""

    def __init__(self, settings: GatewaySettings, action: ActionBackend) -> None:
        self._images = settings.images
        self._default_timeout_s = settings.default_timeout_ms / 1e3
        self._action = action

    @property
    def not_ready_reason(self) -> str:
        """Why no request can be answered now, for people; empty: every backend is warm and within reach."""
        return self._action.not_ready_reason

    async def wait_ready(self) -> None:
        """Returns when every backend is ready."""
        await self._action.wait_ready()

    async def infer(
        self, body: wire.Pieces, *, timeout_s: float | None = None, trace: TraceContext = NO_TRACE
    ) -> memoryview:
        """Answers one inference.

        Args:
            body: serialized InferRequest.
            timeout_s: time that the request may take; None: the configured default.
            trace: where the request stands in its caller's trace.

        Returns:
            The serialized InferResponse.

        Raises:
            ServiceError: there is no answer, and why.
        """
        deadline = self._deadline(timeout_s)
        _check_mode(wire.read_head(body).mode)
        return await self._action.infer(body, deadline, trace)

    async def reset(self, body: bytes, *, timeout_s: float | None = None, trace: TraceContext = NO_TRACE) -> bytes:
        """Forgets a session; a ResetRequest in, a ResetResponse out, both serialized.

        Raises:
            ServiceError: a backend's refusal, or that it did not answer.
        """
        return await self._action.call("Reset", body, self._deadline(timeout_s), trace)

    def metadata(self) -> inference_pb2.GetMetadataResponse:
        """What is served, and how this gateway's operator wants the pictures sent.

        Raises:
            UnavailableError: a backend is not ready.
        """
        if self.not_ready_reason:
            raise UnavailableError(self.not_ready_reason)
        return _with_encoding(self._action.metadata, self._images)

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._default_timeout_s if timeout_s is None else timeout_s)


def _check_mode(mode: int) -> None:
    if mode in (inference_pb2.MODE_UNSPECIFIED, inference_pb2.MODE_DEFAULT, inference_pb2.MODE_ACTION_ONLY):
        return
    if mode == inference_pb2.MODE_SUBTASK_ONLY:
        raise FailedPreconditionError(
            "mode: subtask_only needs a planner, and the server's configuration has no `planner` section", "mode"
        )
    raise InvalidArgumentError(f"mode: {mode} is not one of default (1), subtask_only (2) and action_only (3)", "mode")


def _with_encoding(
    metadata: inference_pb2.GetMetadataResponse, images: ImageSettings
) -> inference_pb2.GetMetadataResponse:
    answer = inference_pb2.GetMetadataResponse()
    answer.CopyFrom(metadata)
    for spec in answer.image_specs:
        spec.encoding = _ENCODINGS[images.encoding]
        spec.jpeg_quality = images.quality if images.encoding == "jpeg" else 0
        spec.jpeg_subsampling = images.subsampling if images.encoding == "jpeg" else ""
    return answer
