"""The planner alone: subtasks, and no actions."""

from openpi_flash.v1 import inference_pb2, planner_pb2
from openpi_flash_common.errors import FailedPreconditionError
from openpi_flash_common.settings import EngineSettings
from openpi_flash_common.telemetry import NO_TRACE, TraceContext

from openpi_flash_gateway import wire
from openpi_flash_gateway.endpoint import Admission, Endpoint, check_mode
from openpi_flash_gateway.planner_backend import PlannerBackend
from openpi_flash_gateway.subtasks import FRESH


class PlannerEndpoint(Endpoint):
    """Answers every request with a subtask of its own.

    Attributes:
        backend: the planner.
        fallback_prompt: the task of a request that has none, which goes before the planner's own; empty: none.
    """

    def __init__(self, settings: EngineSettings, admission: Admission, backend: PlannerBackend) -> None:
        super().__init__(settings.gateway, admission)
        self.backend = backend
        self.fallback_prompt = ""
        self._mode = settings.mode

    @property
    def not_ready_reason(self) -> str:
        return self.backend.not_ready_reason

    async def infer(
        self,
        body: wire.Pieces,
        *,
        session_id: str = "",
        timeout_s: float | None = None,
        trace: TraceContext = NO_TRACE,
    ) -> bytes:
        deadline = self._deadline(timeout_s)
        head = wire.read_head(body)
        check_mode(head.mode)
        if head.mode == inference_pb2.MODE_ACTION_ONLY:
            raise FailedPreconditionError("mode: action_only needs an action policy, and this is the planner", "mode")
        with self._admission.admitted():
            answer = await self.write(head.session_id or session_id, wire.read_question(body), deadline, trace)
        subtask = inference_pb2.Subtask(text=answer.text, ms=answer.ms, status=FRESH)
        response = inference_pb2.InferResponse(subtask=subtask, timing=answer.timing)
        response.timing.planner_ms = answer.ms
        return response.SerializeToString()

    async def write(
        self, session_id: str, question: wire.Question, deadline: float, trace: TraceContext
    ) -> planner_pb2.GenerateSubtaskResponse:
        """A subtask for one observation, by a deadline on the clock of `time.monotonic`. Raises ServiceErrors."""
        request = wire.write_subtask_request(session_id, question, self.fallback_prompt)
        return await self.backend.generate(request, deadline, trace)

    def forget(self, session_id: str) -> None:
        """Nothing is kept."""

    def _describe(self) -> inference_pb2.GetMetadataResponse:
        planner = self.backend.metadata
        return inference_pb2.GetMetadataResponse(
            image_specs=planner.image_specs,
            server_version=planner.server_version,
            server_mode=self._mode,
            planner_model_config_name=planner.model_config_name,
        )
