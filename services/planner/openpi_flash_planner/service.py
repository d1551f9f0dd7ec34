"""PlannerService: requests from the wire to the scheduler, subtasks back."""

import contextlib
import functools
import importlib.metadata
import time
from collections.abc import AsyncGenerator

import grpc
from openpi_flash.v1 import planner_pb2, planner_pb2_grpc
from openpi_flash_common.codec import image_specs_to_proto, observation_from_proto
from openpi_flash_common.errors import InvalidArgumentError
from openpi_flash_common.model_server import ModelServicer, deadline_after, timing_to_proto
from openpi_flash_common.scheduler import Answer, Scheduler
from openpi_flash_common.telemetry import current_span
from openpi_flash_models.errors import InvalidObservationError
from openpi_flash_models.images import ImageLayout
from openpi_flash_models.planner.planner import GenerationOptions, Planner, PreparedPlan

from openpi_flash_planner.configuration import Configuration

_Request = planner_pb2.GenerateSubtaskRequest | planner_pb2.GenerateSubtaskStreamRequest

SERVICE: str = planner_pb2.DESCRIPTOR.services_by_name["PlannerService"].full_name


class PlannerServicer(ModelServicer[Planner], planner_pb2_grpc.PlannerServiceServicer):
    """The handlers. Before the planner is ready, only the configuration is answered for.

    Attributes:
        configuration: the one in force; a request keeps the one that it found.
    """

    def __init__(self, scheduler: Scheduler, configuration: Configuration) -> None:
        super().__init__(scheduler, "planner")
        self.configuration = configuration

    def register(self, server: grpc.aio.Server) -> None:
        planner_pb2_grpc.add_PlannerServiceServicer_to_server(self, server)

    async def GenerateSubtask(  # noqa: N802 - gRPC's name
        self, request: planner_pb2.GenerateSubtaskRequest, context: grpc.aio.ServicerContext
    ) -> planner_pb2.GenerateSubtaskResponse:
        arrived, configuration = time.monotonic(), self.configuration
        prepare = functools.partial(_prepare, request=request, options=configuration.options)
        answer = await self.infer(prepare, context.time_remaining(), current_span())
        return _response(answer, configuration, arrived)

    async def GenerateSubtaskStream(  # noqa: N802 - gRPC's name
        self, request: planner_pb2.GenerateSubtaskStreamRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[planner_pb2.GenerateSubtaskStreamResponse, None]:
        arrived, configuration = time.monotonic(), self.configuration
        planner, deadline = self.ready_model(), deadline_after(context.time_remaining())
        prepare = functools.partial(_prepare, planner, request, configuration.options)
        answers = self.scheduler.stream(planner, prepare, deadline, current_span(), planner.stream)
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
        planner = self.ready_model()
        return planner_pb2.GetPlannerMetadataResponse(
            model_config_name=planner.config.name,
            image_specs=image_specs_to_proto(planner.image_specs),
            server_version=importlib.metadata.version("openpi-flash-planner"),
        )


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


def _response(answer: Answer, configuration: Configuration, arrived: float) -> planner_pb2.GenerateSubtaskResponse:
    timing = timing_to_proto(answer, arrived)
    return planner_pb2.GenerateSubtaskResponse(
        text=answer.result.text,
        ms=timing.total_ms,
        num_tokens=answer.result.num_tokens,
        timing=timing,
        action_prompt=configuration.action_prompt(answer.result),
    )
