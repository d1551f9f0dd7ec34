"""When a subtask is written, and which one an action is conditioned on: the planner's cadence, and robots' sessions.

- every_request: each action waits for a subtask of its own.
- interval: an action waits when the session's subtask is older than the interval; others use the one there is.
- background: no action waits. When one is answered, and `planner.background_interval_ms` have passed since the last,
  the session's next subtask is begun from its observation; an action uses the newest that is finished.

A planner that fails, or is slower than `planner.timeout_ms`, costs the action its subtask and nothing else.
"""

import asyncio
import collections
import dataclasses
import functools
import time
from collections.abc import Awaitable, Callable

from openpi_flash.v1 import inference_pb2, planner_pb2
from openpi_flash_common.errors import DeadlineExceededError, InternalError, ServiceError, to_service_error
from openpi_flash_common.settings import Cadence, IntervalCadence, PlannerSettings

FRESH = inference_pb2.SUBTASK_STATUS_FRESH
REUSED = inference_pb2.SUBTASK_STATUS_REUSED
FAILED = inference_pb2.SUBTASK_STATUS_FAILED
PENDING = inference_pb2.SUBTASK_STATUS_PENDING
STATUS_NAMES = {FRESH: "fresh", REUSED: "reused", FAILED: "failed", PENDING: "pending"}

Generate = Callable[[float], Awaitable[planner_pb2.GenerateSubtaskResponse]]
"""Writes a subtask from one observation by a deadline on the clock of `time.monotonic`; raises ServiceErrors."""

_MAX_SESSIONS = 4096
_RETRY_S = 1.0  # between attempts of the background cadence after one that failed


@dataclasses.dataclass(frozen=True)
class Choice:
    """What an action is conditioned on.

    Attributes:
        subtask: for the response.
        action_prompt: the action policy's prompt; empty: the request's own.
        then: to be called when the action has been computed, so that what it begins is in nobody's way.
    """

    subtask: inference_pb2.Subtask
    action_prompt: str = ""
    then: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class _Finished:
    answer: planner_pb2.GenerateSubtaskResponse
    at: float

    def choice(self, status: inference_pb2.SubtaskStatus, age_s: float = 0.0, error: str = "") -> Choice:
        subtask = inference_pb2.Subtask(
            text=self.answer.text, ms=self.answer.ms, status=status, age_ms=age_s * 1e3, error=error
        )
        return Choice(subtask, self.answer.action_prompt)


@dataclasses.dataclass
class _Session:
    """What is kept for a robot that works on one task.

    Attributes:
        task: in words; another one begins a new session.
        finished: the newest subtask.
        attempt: the one that is being written, or the last.
        next_at: when the next attempt may begin in the background.
        error: why the last attempt failed; empty: it did not.
        failed_at: when it did.
        is_closed: the session is over.
    """

    task: str
    finished: _Finished | None = None
    attempt: "asyncio.Task[_Finished] | None" = None
    next_at: float = -1e9
    error: str = ""
    failed_at: float = -1e9
    is_closed: bool = False

    def close(self) -> None:
        self.is_closed = True
        if self.attempt is not None:
            self.attempt.cancel()


class Subtasks:
    """Chooses subtasks for actions.

    Attributes:
        cadence: may be changed at any time.
    """

    def __init__(
        self, settings: PlannerSettings, *, background_timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            background_timeout_s: time that a subtask may take for which no action waits.
        """
        self.cadence: Cadence = settings.cadence
        self._timeout_s = settings.timeout_ms / 1e3
        self._max_age_s = settings.max_age_ms / 1e3
        self._background_interval_s = settings.background_interval_ms / 1e3
        self._background_timeout_s = background_timeout_s
        self._clock = clock
        self._sessions: collections.OrderedDict[str, _Session] = collections.OrderedDict()

    async def choose(self, session_id: str, task: str, deadline: float, generate: Generate) -> Choice:
        """The subtask of one action.

        Args:
            session_id: whose; empty: nobody's, so that nothing can be reused.
            task: in words.
            deadline: by which the action can wait for it.
            generate: writes one from this action's observation.
        """
        deadline = min(deadline, self._clock() + self._timeout_s)
        if self.cadence == "every_request" or not session_id:
            return await self._every_request(deadline, generate)
        session = self._session(session_id, task)
        if isinstance(self.cadence, IntervalCadence):
            return await self._interval(session, self.cadence.interval_ms / 1e3, deadline, generate)
        return self._background(session, generate)

    def forget(self, session_id: str) -> None:
        """Drops what is kept for a session, the subtask that is being written included."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            session.close()

    def close(self) -> None:
        """Drops every session."""
        for session_id in tuple(self._sessions):
            self.forget(session_id)

    async def _every_request(self, deadline: float, generate: Generate) -> Choice:
        try:
            return (await self._generate(deadline, generate)).choice(FRESH)
        except Exception as error:
            return _failed(_reason(error))

    async def _interval(self, session: _Session, interval_s: float, deadline: float, generate: Generate) -> Choice:
        now = self._clock()
        if session.finished is not None and now - session.finished.at < interval_s:
            return session.finished.choice(REUSED, now - session.finished.at)
        if now - session.failed_at < interval_s:
            return _failed(session.error)
        if session.attempt is None or session.attempt.done():
            session.attempt = self._start(session, self._timeout_s, generate)
        try:
            async with asyncio.timeout(deadline - now):
                # Another request of the session may be waiting for the same attempt.
                return (await asyncio.shield(session.attempt)).choice(FRESH)
        except TimeoutError:
            return _failed("the planner had not answered in time")
        except ServiceError as error:
            return _failed(_reason(error))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return _failed("the session was reset while its subtask was being written")

    def _background(self, session: _Session, generate: Generate) -> Choice:
        return dataclasses.replace(self._newest(session), then=functools.partial(self._begin_next, session, generate))

    def _begin_next(self, session: _Session, generate: Generate) -> None:
        now = self._clock()
        if now < session.next_at or session.is_closed or not (session.attempt is None or session.attempt.done()):
            return
        session.next_at = now + self._background_interval_s
        session.attempt = self._start(session, self._background_timeout_s, generate)

    def _newest(self, session: _Session) -> Choice:
        now, finished = self._clock(), session.finished
        if finished is not None and now - finished.at < self._max_age_s:
            return finished.choice(REUSED, now - finished.at, session.error)
        if session.error:
            return _failed(session.error)
        if finished is not None:
            return _failed(f"the newest subtask is {now - finished.at:.1f} s old, too old to be used")
        return Choice(inference_pb2.Subtask(status=PENDING))

    def _start(self, session: _Session, timeout_s: float, generate: Generate) -> "asyncio.Task[_Finished]":
        """Has a subtask written for the session beside whatever else goes on."""
        attempt = asyncio.create_task(self._generate(self._clock() + timeout_s, generate))

        def done(attempt: "asyncio.Task[_Finished]") -> None:
            if attempt.cancelled():
                return
            error = attempt.exception()
            if error is None:
                session.finished, session.error, session.failed_at = attempt.result(), "", -1e9
            else:
                session.error, session.failed_at = _reason(error), self._clock()
                session.next_at = session.failed_at + _RETRY_S

        attempt.add_done_callback(done)
        return attempt

    async def _generate(self, deadline: float, generate: Generate) -> _Finished:
        try:
            async with asyncio.timeout(deadline - self._clock()):
                answer = await generate(deadline)
        except TimeoutError:
            raise DeadlineExceededError("the planner had not answered in time") from None
        if not answer.text:
            raise InternalError("the planner wrote nothing")
        return _Finished(answer, self._clock())

    def _session(self, session_id: str, task: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is not None and session.task != task:
            self.forget(session_id)
            session = None
        if session is None:
            session = self._sessions[session_id] = _Session(task)
            if len(self._sessions) > _MAX_SESSIONS:
                self.forget(next(iter(self._sessions)))
        self._sessions.move_to_end(session_id)
        return session


def _failed(reason: str) -> Choice:
    return Choice(inference_pb2.Subtask(status=FAILED, error=reason))


def _reason(error: BaseException) -> str:
    known = to_service_error(error)
    return f"{known.code.name}: {known.message}"
