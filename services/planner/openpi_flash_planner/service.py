"""PlannerService: requests from the wire to the scheduler, subtasks back."""

import asyncio
import contextlib
import functools
import importlib.metadata
import math
import time
from collections.abc import AsyncGenerator

import grpc
from openpi_flash.v1 import planner_pb2, planner_pb2_grpc, types_pb2
from openpi_flash_common.codec import image_specs_to_proto, observation_from_proto
from openpi_flash_common.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from openpi_flash_common.scheduler import Answer, Scheduler
from openpi_flash_common.telemetry import current_span
from openpi_flash_models.errors import InvalidObservationError
from openpi_flash_models.images import ImageLayout
from openpi_flash_models.planner.planner import GenerationOptions, Planner, PreparedPlan

from openpi_flash_planner.configuration import Configuration

_Request = planner_pb2.GenerateSubtaskRequest | planner_pb2.GenerateSubtaskStreamRequest

SERVICE: str = planner_pb2.DESCRIPTOR.services_by_name["PlannerService"].full_name


class PlannerServicer(planner_pb2_grpc.PlannerServiceServicer):
    """The handlers. `planner` must be set when it is loaded and warm.

    Attributes:
        planner: None: not ready yet; only the configuration is answered for.
        configuration: the one in force; a request keeps the one that it found.
    """

    def __init__(self, scheduler: Scheduler, configuration: Configuration) -> None:
        self.planner: Planner | None = None
        self.configuration = configuration
        self._scheduler = scheduler

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the handlers to a gRPC server."""
        planner_pb2_grpc.add_PlannerServiceServicer_to_server(self, server)

    async def GenerateSubtask(  # noqa: N802 - gRPC's name
        self, request: planner_pb2.GenerateSubtaskRequest, context: grpc.aio.ServicerContext
    ) -> planner_pb2.GenerateSubtaskResponse:
        arrived, timeout_s = time.monotonic(), context.time_remaining()
        planner = self._ready_planner()
        configuration = self.configuration
        prepare = functools.partial(_prepare, planner, request, configuration.options)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._scheduler.infer(planner, prepare, _deadline(arrived, timeout_s), current_span())
        except TimeoutError:
            raise DeadlineExceededError("the request's time ran out before the subtask was there") from None
        return _response(answer, configuration, arrived)

    async def GenerateSubtaskStream(  # noqa: N802 - gRPC's name
        self, request: planner_pb2.GenerateSubtaskStreamRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[planner_pb2.GenerateSubtaskStreamResponse, None]:
        arrived = time.monotonic()
        planner = self._ready_planner()
        configuration = self.configuration
        prepare = functools.partial(_prepare, planner, request, configuration.options)
        deadline = _deadline(arrived, context.time_remaining())
        answers = self._scheduler.stream(planner, prepare, deadline, current_span(), planner.stream)
        num_sent = 0
        async with contextlib.aclosing(answers):
            async for answer in answers:
                subtask = answer.result
                message = planner_pb2.GenerateSubtaskStreamResponse(
                    text_delta=subtask.text[num_sent:], done=subtask.is_whole
                )
                if subtask.is_whole:
                    message.response.CopyFrom(_response(answer, configuration, arrived))
                if message.text_delta or message.done:
                    num_sent = len(subtask.text)
                    yield message
                if message.done:
                    return

    async def GetConfig(  # noqa: N802 - gRPC's name
        self, _: planner_pb2.GetConfigRequest, __: grpc.aio.ServicerContext
    ) -> planner_pb2.GetConfigResponse:
        return planner_pb2.GetConfigResponse(config=self.configuration.to_proto())

    async def UpdateConfig(  # noqa: N802 - gRPC's name
        self, request: planner_pb2.UpdateConfigRequest, _: grpc.aio.ServicerContext
    ) -> planner_pb2.UpdateConfigResponse:
        self.configuration = self.configuration.updated(request)
        return planner_pb2.UpdateConfigResponse(config=self.configuration.to_proto())

    async def GetPlannerMetadata(  # noqa: N802 - gRPC's name
        self, _: planner_pb2.GetPlannerMetadataRequest, __: grpc.aio.ServicerContext
    ) -> planner_pb2.GetPlannerMetadataResponse:
        planner = self._ready_planner()
        return planner_pb2.GetPlannerMetadataResponse(
            model_config_name=planner.config.name,
            image_specs=image_specs_to_proto(planner.image_specs),
            server_version=importlib.metadata.version("openpi-flash-planner"),
        )

    def _ready_planner(self) -> Planner:
        if self.planner is None:
            raise UnavailableError("the planner is being loaded and warmed up; try again later")
        return self.planner


def _prepare(planner: Planner, request: _Request, options: GenerationOptions) -> PreparedPlan:
    """Decodes and prepares a request; what `models` finds wrong with it becomes the services' error."""
    channels_first = {spec.path for spec in planner.image_specs if spec.layout is ImageLayout.CHW}
    entries, prompt = observation_from_proto(request.observation, channels_first)
    try:
        return planner.prepare(
            entries, prompt=prompt, options=options, seed=request.seed if request.HasField("seed") else None
        )
    except InvalidObservationError as error:
        raise InvalidArgumentError(str(error), error.field) from error


def _deadline(arrived: float, timeout_s: float | None) -> float:
    return math.inf if timeout_s is None else arrived + timeout_s


def _response(answer: Answer, configuration: Configuration, arrived: float) -> planner_pb2.GenerateSubtaskResponse:
    total_ms = (time.monotonic() - arrived) * 1e3
    return planner_pb2.GenerateSubtaskResponse(
        text=answer.result.text,
        ms=total_ms,
        num_tokens=answer.result.num_tokens,
        action_prompt=configuration.action_prompt(answer.result),
        timing=types_pb2.Timing(
            queue_ms=answer.queue_ms,
            preprocess_ms=answer.preprocess_ms,
            model_ms=answer.model_ms,
            postprocess_ms=answer.postprocess_ms,
            total_ms=total_ms,
            batch_size=answer.batch_size,
        ),
    )
