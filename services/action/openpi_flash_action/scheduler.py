"""From waiting requests to model calls: a bounded queue, one accelerator, batches of requests with equal shapes."""

import asyncio
import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from openpi_flash_common.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from openpi_flash_common.telemetry import Span, Telemetry

logger = logging.getLogger(__name__)

PREPARING_THREADS = 2


class RunnablePolicy(Protocol):
    """What of `openpi_flash_models.policy.Policy` the scheduler uses."""

    @property
    def batch_sizes(self) -> tuple[int, ...]: ...
    def run(self, prepared: list[Any]) -> list[np.ndarray]: ...
    def finish(self, prepared: Any, model_actions: np.ndarray) -> dict[str, np.ndarray]: ...
    def warm_up_shapes(self) -> list[Any]: ...
    def warm_up(self, shapes: list[Any]) -> None: ...


class AcceleratorLostError(Exception):
    """The accelerator no longer runs even the smallest known-good call: only a new process can help."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of one request, and where its time went.

    Attributes:
        tensors: named results, `actions` among them.
        queue_ms: waiting, for a thread to be prepared in and for the accelerator.
        batch_size: requests in the model call.
    """

    tensors: dict[str, np.ndarray]
    queue_ms: float
    preprocess_ms: float
    model_ms: float
    postprocess_ms: float
    batch_size: int


@dataclasses.dataclass(eq=False)
class _Job:
    """A prepared request that waits for the accelerator. Times are `time.monotonic()` seconds."""

    prepared: Any
    deadline: float
    span: Span
    waited_s: float
    preprocess_s: float
    queued: float
    answer: asyncio.Future[Answer]


class Scheduler:
    """Runs requests on one accelerator. Belongs to the event loop that calls `infer`; the model never blocks it.

    Whatever may take long happens in threads: preparing in a few of their own, so that bad input is refused while the
    accelerator is busy, and every use of the model in a single one, in which it was loaded, too.

    Attributes:
        lost: ends with an AcceleratorLostError when the accelerator has failed for good.
    """

    def __init__(self, queue_size: int, telemetry: Telemetry) -> None:
        """
        Args:
            queue_size: most requests that are prepared or wait; more are refused at once.
        """
        self._queue_size = queue_size
        self._telemetry = telemetry
        self._metrics = telemetry.metrics
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, "prepare")
        self._accelerator = ThreadPoolExecutor(1, "accelerator")
        self._waiting: deque[_Job] = deque()
        self._num_queued = 0
        self._working = False
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def on_accelerator(self, function: Callable[[], Any]) -> Any:
        """Runs something in the accelerator's thread, e.g. loading the model and warming it up."""
        return await asyncio.get_running_loop().run_in_executor(self._accelerator, function)

    async def infer(self, policy: RunnablePolicy, prepare: Callable[[], Any], deadline: float, span: Span) -> Answer:
        """Prepares a request and has it answered. Cancelling the call drops what has not reached the accelerator.

        Args:
            policy: the one policy of this scheduler.
            prepare: makes the prepared request; called in a thread.
            deadline: `time.monotonic()` seconds, after which the request must not reach the accelerator.
            span: the request's.

        Raises:
            ResourceExhaustedError: too many wait already.
            DeadlineExceededError: its time was over before the accelerator was free.
            UnavailableError: the accelerator has failed for good.
            Exception: what `prepare` or the model raised.
        """
        if self._num_queued >= self._queue_size:
            raise ResourceExhaustedError(
                f"{self._num_queued} requests wait for the accelerator, as many as may; try again later"
            )
        arrived = time.monotonic()
        loop = asyncio.get_running_loop()
        if not self._working and not self._num_queued:
            # Nobody else is here: prepared where it runs, the request changes threads twice in place of four times.
            job = _Job(None, deadline, span, 0.0, 0.0, arrived, loop.create_future())
            self._start(policy, [job], functools.partial(self._prepare_and_run, policy, job, prepare))
            return await job.answer
        self._count_queued(1)
        try:
            started, ended, prepared = await loop.run_in_executor(self._preparing, _timed, prepare, deadline)
            if self.lost.done():
                raise _unavailable()
        except BaseException:
            self._count_queued(-1)
            raise
        self._telemetry.record("prepare", span, started, ended)
        job = _Job(prepared, deadline, span, started - arrived, ended - started, ended, loop.create_future())
        self._waiting.append(job)
        if not self._working:
            self._work(policy)
        try:
            return await job.answer
        except asyncio.CancelledError:
            if job in self._waiting:  # its place is for another
                self._waiting.remove(job)
                self._count_queued(-1)
            raise

    def close(self) -> None:
        """Ends the threads, once what they do is done."""
        self._preparing.shutdown()
        self._accelerator.shutdown()

    def _work(self, policy: RunnablePolicy) -> None:
        """Hands the next batch to the accelerator's thread; comes back when it is done."""
        batch = self._next_batch(policy.batch_sizes[-1])
        if not batch:
            self._working = False
            return
        started = time.monotonic()
        for job in batch:
            job.waited_s += started - job.queued
            self._telemetry.record("queue", job.span, job.queued, started)
            self._metrics.queue_wait_seconds.observe(job.waited_s)
        self._start(policy, batch, functools.partial(self._run, policy, batch))

    def _start(self, policy: RunnablePolicy, batch: list[_Job], run: Callable[[], list[Answer | Exception]]) -> None:
        self._working = True
        future = asyncio.get_running_loop().run_in_executor(self._accelerator, run)
        future.add_done_callback(lambda done: self._deliver(policy, batch, done))

    def _next_batch(self, max_batch_size: int) -> list[_Job]:
        """The oldest request that is still wanted, and what may share its model call."""
        batch: list[_Job] = []
        kept: deque[_Job] = deque()
        now = time.monotonic()
        while self._waiting and len(batch) < max_batch_size:
            job = self._waiting.popleft()
            if job.answer.done():  # given up a moment ago
                self._count_queued(-1)
            elif job.deadline <= now:
                self._count_queued(-1)
                job.answer.set_exception(_too_late())
            elif not batch or _may_share(batch[0], job):
                self._count_queued(-1)
                batch.append(job)
                if job.prepared.request.deterministic:
                    break
            else:
                kept.append(job)
        kept.extend(self._waiting)
        self._waiting = kept
        return batch

    def _prepare_and_run(
        self, policy: RunnablePolicy, job: _Job, prepare: Callable[[], Any]
    ) -> list[Answer | Exception]:
        """In the accelerator's thread: all of a request that found nobody waiting."""
        try:
            started, ended, job.prepared = _timed(prepare, job.deadline)
        except Exception as error:
            return [error]
        job.waited_s, job.preprocess_s = started - job.queued, ended - started
        self._telemetry.record("prepare", job.span, started, ended)
        self._metrics.queue_wait_seconds.observe(job.waited_s)
        if job.answer.done() or job.deadline <= ended:
            return [_too_late()]
        return self._run(policy, [job])

    def _run(self, policy: RunnablePolicy, batch: list[_Job]) -> list[Answer | Exception]:
        """In the accelerator's thread: one model call, or, where it fails, one for each request.

        Raises:
            AcceleratorLostError: it is not the requests that are at fault.
        """
        try:
            return self._call_model(policy, batch)
        except Exception as error:
            if len(batch) == 1:
                _check_accelerator(policy, error)
                return [error]
            logger.warning("a batch of %d failed; running its requests one by one", len(batch), exc_info=error)
            return [answer for job in batch for answer in self._run(policy, [job])]

    def _call_model(self, policy: RunnablePolicy, batch: list[_Job]) -> list[Answer | Exception]:
        started = time.monotonic()
        model_actions = policy.run([job.prepared for job in batch])
        ended = time.monotonic()
        self._metrics.batch_size.observe(len(batch))
        self._metrics.model_seconds.observe(ended - started)
        answers: list[Answer | Exception] = []
        for job, actions in zip(batch, model_actions, strict=True):
            self._telemetry.record("model", job.span, started, ended, batch_size=len(batch))
            finishing = time.monotonic()
            try:
                tensors = policy.finish(job.prepared, actions)
            except Exception as error:
                answers.append(error)
                continue
            answers.append(
                Answer(
                    tensors=tensors,
                    queue_ms=job.waited_s * 1e3,
                    preprocess_ms=job.preprocess_s * 1e3,
                    model_ms=(ended - started) * 1e3,
                    postprocess_ms=(time.monotonic() - finishing) * 1e3,
                    batch_size=len(batch),
                )
            )
        return answers

    def _deliver(
        self, policy: RunnablePolicy, batch: list[_Job], done: asyncio.Future[list[Answer | Exception]]
    ) -> None:
        error = done.exception()
        if error is not None:
            self._give_up(batch, error)
            return
        self._work(policy)  # first the accelerator, then the answers
        for job, answer in zip(batch, done.result(), strict=True):
            if job.answer.done():  # given up while it ran
                continue
            if isinstance(answer, Exception):
                job.answer.set_exception(answer)
            else:
                job.answer.set_result(answer)

    def _give_up(self, batch: list[_Job], error: BaseException) -> None:
        """Refuses everything from now on; `_working` stays set, so that nothing more reaches the accelerator."""
        for job in (*batch, *self._waiting):
            if not job.answer.done():
                job.answer.set_exception(_unavailable())
        self._count_queued(-len(self._waiting))
        self._waiting.clear()
        self.lost.set_exception(error)

    def _count_queued(self, change: int) -> None:
        self._num_queued += change
        self._metrics.queue_depth.set(self._num_queued)


def _timed(prepare: Callable[[], Any], deadline: float) -> tuple[float, float, Any]:
    started = time.monotonic()
    if deadline <= started:
        raise _too_late()
    prepared = prepare()
    return started, time.monotonic(), prepared


def _may_share(first: _Job, other: _Job) -> bool:
    one, two = first.prepared.request, other.prepared.request
    return one.shape_key == two.shape_key and not one.deterministic and not two.deterministic


def _check_accelerator(policy: RunnablePolicy, failure: Exception) -> None:
    """Tells a call that failed by itself from an accelerator that failed: one more call, of known-good inputs."""
    try:
        policy.warm_up(policy.warm_up_shapes()[:1])
    except Exception as error:
        raise AcceleratorLostError(f"the accelerator has failed: {failure}") from error


def _unavailable() -> UnavailableError:
    return UnavailableError("the accelerator has failed; the service is about to stop")


def _too_late() -> DeadlineExceededError:
    return DeadlineExceededError("the request's time ran out before the accelerator was free")
