"""ActionService: requests from the wire to the scheduler, answers back."""

import functools
import importlib.metadata
import time
from collections.abc import AsyncIterator

import grpc
from google.protobuf import struct_pb2
from openpi_flash.v1 import action_pb2, action_pb2_grpc, inference_pb2, types_pb2
from openpi_flash_common.codec import (
    image_specs_to_proto,
    observation_from_proto,
    tensor_from_proto,
    tensor_to_proto,
)
from openpi_flash_common.errors import FailedPreconditionError, InvalidArgumentError, error_to_proto
from openpi_flash_common.model_server import ModelServicer, timing_to_proto
from openpi_flash_common.scheduler import Scheduler
from openpi_flash_common.telemetry import Span, Telemetry, TraceContext, current_span
from openpi_flash_models.errors import InvalidObservationError
from openpi_flash_models.images import ImageLayout
from openpi_flash_models.policy import Policy, PreparedPolicyRequest

SERVICE: str = action_pb2.DESCRIPTOR.services_by_name["ActionService"].full_name

_MODES = (inference_pb2.MODE_UNSPECIFIED, inference_pb2.MODE_DEFAULT, inference_pb2.MODE_ACTION_ONLY)


class ActionServicer(ModelServicer[Policy], action_pb2_grpc.ActionServiceServicer):
    """The handlers."""

    def __init__(self, scheduler: Scheduler, telemetry: Telemetry) -> None:
        super().__init__(scheduler, "policy")
        self._telemetry = telemetry

    def register(self, server: grpc.aio.Server) -> None:
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
        return _metadata(self.ready_model())

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
        policy = self.ready_model()
        _check_mode(request.mode)
        prepare = functools.partial(_prepare, request=request)
        answer = await self.infer(prepare, timeout_s, span, policy.finish)
        tensors = {name: tensor_to_proto(array, name) for name, array in answer.result.items()}
        return inference_pb2.InferResponse(tensors=tensors, timing=timing_to_proto(answer, arrived))


def _prepare(policy: Policy, request: inference_pb2.InferRequest) -> PreparedPolicyRequest:
    """Decodes and prepares a request; what `models` finds wrong with it becomes the services' error."""
    channels_first = {spec.path for spec in policy.image_specs if spec.layout is ImageLayout.CHW}
    observation, prompt = observation_from_proto(request.observation, channels_first)
    noise = previous_actions = None
    if request.HasField("noise"):
        noise = tensor_from_proto(request.noise, "noise")
    if request.HasField("previous_actions"):
        previous_actions = tensor_from_proto(request.previous_actions, "previous_actions")
    try:
        return policy.prepare(
            observation,
            prompt=prompt,
            seed=request.seed if request.HasField("seed") else None,
            noise=noise,
            num_steps=request.num_steps or None,
            previous_actions=previous_actions,
            inference_delay=request.inference_delay if request.HasField("inference_delay") else None,
            execution_horizon=request.execution_horizon if request.HasField("execution_horizon") else None,
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
        real_time_chunking=policy.continues or "",
        server_version=importlib.metadata.version("openpi-flash-action"),
    )
