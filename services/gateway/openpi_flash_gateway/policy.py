"""The action policy, with or without a planner before it: mode, subtask, deadline, the same for every transport."""

import time

from openpi_flash.v1 import inference_pb2, planner_pb2, types_pb2
from openpi_flash_common.errors import FailedPreconditionError
from openpi_flash_common.settings import EngineSettings
from openpi_flash_common.telemetry import NO_TRACE, Metrics, TraceContext

from openpi_flash_gateway import wire
from openpi_flash_gateway.action_backend import ActionBackend
from openpi_flash_gateway.endpoint import Admission, Endpoint, check_mode
from openpi_flash_gateway.planner_endpoint import PlannerEndpoint
from openpi_flash_gateway.subtasks import STATUS_NAMES, Choice, Subtasks

_RESERVED_SHARE = 0.25  # of a request's time, at least, for the action
_MEAN_WEIGHT = 0.2  # of the newest action call in their mean time


class Policy(Endpoint):
    """Answers robots with actions, which are conditioned on a subtask where there is a planner.

    Attributes:
        subtasks: which they are conditioned on; None: there is no planner.
        waits_for_planner: not ready without the planner. True until it was ready once: after that, one that is away
            costs actions their subtask and nothing else.
    """

    def __init__(
        self,
        settings: EngineSettings,
        admission: Admission,
        metrics: Metrics,
        action: ActionBackend,
        planner: PlannerEndpoint | None,
    ) -> None:
        super().__init__(settings.gateway, admission)
        self.subtasks: Subtasks | None = None
        if settings.planner is not None:
            self.subtasks = Subtasks(settings.planner, background_timeout_s=self._default_timeout_s)
        self.waits_for_planner = planner is not None
        self._mode = settings.mode
        self._metrics = metrics
        self._action = action
        self._planner = planner
        self._mean_action_s = 0.0

    @property
    def not_ready_reason(self) -> str:
        if self._planner is not None and self.waits_for_planner:
            return self._action.not_ready_reason or self._planner.not_ready_reason
        return self._action.not_ready_reason

    def refresh(self) -> bool:
        if self._planner is not None:
            self._planner.fallback_prompt = self._action.metadata.default_prompt
            self.waits_for_planner = self.waits_for_planner and bool(self._planner.not_ready_reason)
        return super().refresh()

    async def infer(
        self,
        body: wire.Pieces,
        *,
        session_id: str = "",
        timeout_s: float | None = None,
        trace: TraceContext = NO_TRACE,
    ) -> bytes | memoryview:
        deadline = self._deadline(timeout_s)
        head = wire.read_head(body)
        check_mode(head.mode)
        if head.mode == inference_pb2.MODE_SUBTASK_ONLY:
            if self._planner is None:
                raise FailedPreconditionError(
                    "mode: subtask_only needs a planner, and the server's configuration has no `planner` section",
                    "mode",
                )
            return await self._planner.infer(body, session_id=session_id, timeout_s=timeout_s, trace=trace)
        self._require_ready()
        with self._admission.admitted():
            if self._planner is None or head.mode == inference_pb2.MODE_ACTION_ONLY:
                return await self._action.infer(body, deadline, trace)
            return await self._infer_combined(body, head.session_id or session_id, deadline, trace)

    async def reset(self, body: bytes, *, timeout_s: float | None = None, trace: TraceContext = NO_TRACE) -> bytes:
        await super().reset(body)
        return await self._action.reset(body, self._deadline(timeout_s), trace)

    def forget(self, session_id: str) -> None:
        if self.subtasks is not None:
            self.subtasks.forget(session_id)

    def _describe(self) -> inference_pb2.GetMetadataResponse:
        answer = inference_pb2.GetMetadataResponse()
        answer.CopyFrom(self._action.metadata)
        answer.server_mode = self._mode
        if self._planner is not None:
            answer.planner_model_config_name = self._planner.backend.metadata.model_config_name
        return answer

    async def _infer_combined(
        self, body: wire.Pieces, session_id: str, deadline: float, trace: TraceContext
    ) -> bytes | memoryview:
        arrived = time.monotonic()
        choice = await self._choose(body, session_id, deadline, trace)
        chosen = time.monotonic()
        self._metrics.subtasks.labels(STATUS_NAMES[choice.subtask.status]).inc()
        if choice.action_prompt:
            body = (*body, wire.write_prompt(choice.action_prompt))
        try:
            answer = await self._action.infer(body, deadline, trace)
        finally:
            choice.then()
        answered = time.monotonic()
        self._mean_action_s += _MEAN_WEIGHT * (answered - chosen - self._mean_action_s)
        timing = types_pb2.Timing(planner_ms=(chosen - arrived) * 1e3, total_ms=(answered - arrived) * 1e3)
        ours = inference_pb2.InferResponse(subtask=choice.subtask, timing=timing)
        return b"".join((answer, ours.SerializeToString()))

    async def _choose(self, body: wire.Pieces, session_id: str, deadline: float, trace: TraceContext) -> Choice:
        planner, subtasks = self._planner, self.subtasks
        assert planner is not None and subtasks is not None  # noqa: S101 - asked for by combined mode alone
        question = wire.read_question(body)

        async def generate(by: float) -> planner_pb2.GenerateSubtaskResponse:
            return await planner.write(session_id, question, by, trace)

        task = planner.fallback_prompt if question.prompt is None else question.prompt
        # What the action itself needs is not for the planner to spend.
        reserve_s = max(2 * self._mean_action_s, _RESERVED_SHARE * (deadline - time.monotonic()))
        return await subtasks.choose(session_id, task, deadline - reserve_s, generate)
