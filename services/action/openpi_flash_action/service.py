"""ActionService: requests from the wire to the scheduler, answers back."""

import asyncio
import functools
import importlib.metadata
import math
import time
from collections.abc import AsyncIterator

import grpc
import numpy as np
from google.protobuf import struct_pb2
from openpi_flash.v1 import action_pb2, action_pb2_grpc, inference_pb2, types_pb2
from openpi_flash_common.codec import (
    image_specs_to_proto,
    observation_from_proto,
    tensor_from_proto,
    tensor_to_proto,
)
from openpi_flash_common.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
    error_to_proto,
)
from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.scheduler import Scheduler
from openpi_flash_common.telemetry import Span, Telemetry, TraceContext, current_span
from openpi_flash_models.errors import InvalidObservationError
from openpi_flash_models.images import ImageLayout
from openpi_flash_models.policy import Policy, PreparedPolicyRequest

SERVICE: str = action_pb2.DESCRIPTOR.services_by_name["ActionService"].full_name

_MODES = (inference_pb2.MODE_UNSPECIFIED, inference_pb2.MODE_DEFAULT, inference_pb2.MODE_ACTION_ONLY)


class ActionServicer(action_pb2_grpc.ActionServiceServicer):
    """The handlers. `server` must be set before the first stream, `policy` when it is loaded and warm.

    Attributes:
        policy: None: not ready yet; requests are refused.
    """

    server: GrpcServer

    def __init__(self, scheduler: Scheduler, telemetry: Telemetry) -> None:
        self.policy: Policy | None = None
        self._scheduler = scheduler
        self._telemetry = telemetry

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the handlers to a gRPC server."""
        action_pb2_grpc.add_ActionServiceServicer_to_server(self, server)

    async def Infer(  # noqa: N802 - gRPC's name
        self, request: inference_pb2.InferRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.InferResponse:
        return await self._infer(request, context.time_remaining(), current_span())

    async def InferStream(  # noqa: N802 - gRPC's name
        self, _: AsyncIterator[inference_pb2.InferStreamRequest], context: grpc.aio.ServicerContext
    ) -> None:
        of_stream = TraceContext.from_metadata(context.invocation_metadata())

        async def answer(request: inference_pb2.InferStreamRequest) -> inference_pb2.InferStreamResponse:
            own = TraceContext(request.traceparent, request.tracestate) if request.traceparent else of_stream
            limits = (request.timeout_ms / 1e3 if request.timeout_ms else None, context.time_remaining())
            timeout_s = min((limit for limit in limits if limit is not None), default=None)
            response = inference_pb2.InferStreamResponse(request_id=request.request_id)
            try:
                with self._telemetry.request("ActionService/InferStream", own) as span:
                    response.response.CopyFrom(await self._infer(request.request, timeout_s, span))
            except Exception as error:
                response.error.CopyFrom(error_to_proto(error))
            return response

        await self.server.lock_step(context, answer)

    async def GetMetadata(  # noqa: N802 - gRPC's name
        self, _: inference_pb2.GetMetadataRequest, __: grpc.aio.ServicerContext
    ) -> inference_pb2.GetMetadataResponse:
        return _metadata(self._ready_policy())

    async def Reset(  # noqa: N802 - gRPC's name
        self, request: inference_pb2.ResetRequest, _: grpc.aio.ServicerContext
    ) -> inference_pb2.ResetResponse:
        if not request.session_id:
            raise InvalidArgumentError("session_id: empty; the session to forget is expected", "session_id")
        return inference_pb2.ResetResponse()  # a policy remembers nothing from one request to the next

    async def _infer(
        self, request: inference_pb2.InferRequest, timeout_s: float | None, span: Span
    ) -> inference_pb2.InferResponse:
        arrived = time.monotonic()
        policy = self._ready_policy()
        _check_mode(request.mode)
        deadline = math.inf if timeout_s is None else arrived + timeout_s
        prepare = functools.partial(_prepare, policy, request)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._scheduler.infer(policy, prepare, deadline, span, policy.finish)
        except TimeoutError:
            raise DeadlineExceededError("the request's time ran out before the actions were there") from None
        response = inference_pb2.InferResponse(
            tensors={name: tensor_to_proto(array, name) for name, array in answer.result.items()},
            timing=types_pb2.Timing(
                queue_ms=answer.queue_ms,
                preprocess_ms=answer.preprocess_ms,
                model_ms=answer.model_ms,
                postprocess_ms=answer.postprocess_ms,
                batch_size=answer.batch_size,
            ),
        )
        response.timing.total_ms = (time.monotonic() - arrived) * 1e3
        return response

    def _ready_policy(self) -> Policy:
        if self.policy is None:
            raise UnavailableError("the policy is being loaded and warmed up; try again later")
        return self.policy


def _prepare(policy: Policy, request: inference_pb2.InferRequest) -> PreparedPolicyRequest:
    """Decodes and prepares a request; what `models` finds wrong with it becomes the services' error."""
    channels_first = {spec.path for spec in policy.image_specs if spec.layout is ImageLayout.CHW}
    observation, prompt = observation_from_proto(request.observation, channels_first)
    noise: np.ndarray | None = None
    if request.HasField("noise"):
        noise = tensor_from_proto(request.noise, "noise")
    try:
        return policy.prepare(
            observation,
            prompt=prompt,
            seed=request.seed if request.HasField("seed") else None,
            noise=noise,
            num_steps=request.num_steps or None,
        )
    except InvalidObservationError as error:
        raise InvalidArgumentError(str(error), error.field) from error


def _check_mode(mode: int) -> None:
    if mode == inference_pb2.MODE_SUBTASK_ONLY:
        raise FailedPreconditionError("mode: subtask_only needs a planner, and this is the action service", "mode")
    if mode not in _MODES:
        raise InvalidArgumentError(
            f"mode: {mode} is not one of default (1), subtask_only (2) and action_only (3)", "mode"
        )


def _metadata(policy: Policy) -> inference_pb2.GetMetadataResponse:
    config = policy.config
    policy_metadata = struct_pb2.Struct()
    policy_metadata.update(dict(policy.metadata))
    return inference_pb2.GetMetadataResponse(
        policy_metadata=policy_metadata,
        model_config_name=policy.name,
        model_type=str(config.model.model_type),
        backend=policy.backend.name,
        action_horizon=config.model.action_horizon,
        action_dim=config.model.action_dim,
        robot_action_dim=policy.robot_action_dim,
        default_num_steps=policy.default_num_steps,
        default_prompt=policy.default_prompt or "",
        image_specs=image_specs_to_proto(policy.image_specs),
        tensor_specs=[
            types_pb2.TensorSpec(
                path=spec.path,
                shape=spec.shape,
                dtype=f"DTYPE_{spec.dtype.upper()}",
                required=spec.required,
            )
            for spec in policy.tensor_specs
        ],
        server_version=importlib.metadata.version("openpi-flash-action"),
    )
