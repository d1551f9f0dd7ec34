"""From waiting requests to model calls: a bounded queue, one accelerator, batches of requests with equal shapes."""

import asyncio
import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from openpi_flash_common.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from openpi_flash_common.telemetry import Span, Telemetry

logger = logging.getLogger(__name__)

PREPARING_THREADS = 2

NEWEST_SHARE = 0.2
"""Of the newest call in what is thought of how long a call takes."""


class Prepared(Protocol):
    """What the scheduler looks at in a prepared request."""

    @property
    def shape_key(self) -> Hashable: ...
    @property
    def deterministic(self) -> bool: ...


class RunnableModel(Protocol):
    """What of a policy or a planner the scheduler uses."""

    @property
    def batch_sizes(self) -> tuple[int, ...]: ...
    def run(self, prepared: list[Any]) -> Sequence[Any]: ...
    def warm_up_shapes(self) -> list[Any]: ...
    def warm_up(self, shapes: list[Any]) -> None: ...


def as_it_is(_: Any, output: Any) -> Any:
    """The finish of a model whose outputs need none."""
    return output


class AcceleratorLostError(Exception):
    """The accelerator no longer runs even the smallest known-good call: only a new process can help."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of one request, or a part of it, and where its time went so far.

    Attributes:
        result: what the request's `finish` or `write` gave.
        queue_ms: waiting, for a thread to be prepared in and for the accelerator.
        batch_size: requests in the model call.
    """

    result: Any
    queue_ms: float
    preprocess_ms: float
    model_ms: float
    postprocess_ms: float
    batch_size: int


@dataclasses.dataclass(eq=False)
class _Job:
    """A prepared request that waits for the accelerator. Times are `time.monotonic()` seconds."""

    prepared: Any
    finish: Callable[[Any, Any], Any]
    deadline: float
    span: Span
    waited_s: float
    preprocess_s: float
    queued: float
    answer: asyncio.Future[Answer]


class Pace:
    """How long model calls have taken, and so how many of the waiting requests are best run together.

    A batch is padded to the next size that the model has: nine requests may cost as much as sixteen. Whether they are
    better run as eight, and one later, depends on the model, the device and the shape.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[Hashable, int], float | None] = {}

    def learn(self, shape_key: Hashable, rows: int, seconds: float) -> None:
        """Takes the time of a call of so many rows, padding included. Not that of the first: it may have compiled."""
        call = shape_key, rows
        if call not in self._seconds:
            self._seconds[call] = None
            return
        before = self._seconds[call]
        self._seconds[call] = seconds if before is None else before + NEWEST_SHARE * (seconds - before)

    def choose(self, shape_key: Hashable, waiting: int, sizes: Sequence[int]) -> int:
        """How many of the waiting requests to run: all, or the next smaller size where that gives more per second.

        Args:
            shape_key: theirs.
            waiting: 1 to the largest size.
            sizes: numbers of rows that the model has, ascending, from 1.
        """
        padded = padded_size(waiting, sizes)
        if padded == waiting:
            return waiting
        smaller = max(size for size in sizes if size < waiting)
        padded_s, smaller_s = (self._seconds.get((shape_key, size)) for size in (padded, smaller))
        if padded_s is None or smaller_s is None:
            return waiting  # and so it becomes known
        return smaller if smaller / smaller_s > waiting / padded_s else waiting


def padded_size(count: int, sizes: Sequence[int]) -> int:
    """The rows of a model call of so many requests."""
    return next(size for size in sizes if size >= count)


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
            queue_size: most requests that are prepared, wait, or are streams; more are refused at once.
        """
        self._queue_size = queue_size
        self._telemetry = telemetry
        self._metrics = telemetry.metrics
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, "prepare")
        self._accelerator = ThreadPoolExecutor(1, "accelerator")
        self._pace = Pace()
        self._waiting: deque[_Job] = deque()
        self._num_queued = 0
        self._working = False
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def on_accelerator(self, function: Callable[[], Any]) -> Any:
        """Runs something in the accelerator's thread, e.g. loading the model and warming it up."""
        return await asyncio.get_running_loop().run_in_executor(self._accelerator, function)

    async def infer(
        self,
        model: RunnableModel,
        prepare: Callable[[], Prepared],
        deadline: float,
        span: Span,
        finish: Callable[[Any, Any], Any] = as_it_is,
    ) -> Answer:
        """Prepares a request and has it answered. Cancelling the call drops what has not reached the accelerator.

        Args:
            model: the one model of this scheduler.
            prepare: makes the prepared request; called in a thread.
            deadline: `time.monotonic()` seconds, after which the request must not reach the accelerator.
            span: the request's.
            finish: from the prepared request and the model's output to the result.

        Raises:
            ResourceExhaustedError: too many wait already.
            DeadlineExceededError: its time was over before the accelerator was free.
            UnavailableError: the accelerator has failed for good.
            Exception: what `prepare`, the model or `finish` raised.
        """
        self._check_free()
        arrived = time.monotonic()
        loop = asyncio.get_running_loop()
        if not self._working and not self._num_queued:
            # Nobody else is here: prepared where it runs, the request changes threads twice in place of four times.
            job = _Job(None, finish, deadline, span, 0.0, 0.0, arrived, loop.create_future())
            self._start(model, [job], functools.partial(self._prepare_and_run, model, job, prepare))
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
        job = _Job(prepared, finish, deadline, span, started - arrived, ended - started, ended, loop.create_future())
        self._waiting.append(job)
        if not self._working:
            self._work(model)
        try:
            return await job.answer
        except asyncio.CancelledError:
            if job in self._waiting:  # its place is for another
                self._waiting.remove(job)
                self._count_queued(-1)
            raise

    async def stream(
        self,
        model: RunnableModel,
        prepare: Callable[[], Prepared],
        deadline: float,
        span: Span,
        write: Callable[[Any], Iterator[Any]],
    ) -> AsyncGenerator[Answer, None]:
        """Prepares a request and has it answered in parts. Who stops asking ends the work.

        Each part is a turn on the accelerator of its own: other streams and batches get theirs in between. A stream
        takes one place of the queue until it ends.

        Args:
            model, prepare, deadline, span, raised errors: as those of `infer`; the deadline holds for each part.
            write: from the prepared request to its parts; each is asked for in the accelerator's thread.
        """
        self._check_free()
        arrived = time.monotonic()
        loop = asyncio.get_running_loop()
        self._count_queued(1)
        try:
            started, ended, prepared = await loop.run_in_executor(self._preparing, _timed, prepare, deadline)
            self._telemetry.record("prepare", span, started, ended)
            preprocess_s, queue_s, model_s = ended - started, started - arrived, 0.0
            parts, waiting_since = write(prepared), ended
            while True:
                try:
                    turn = await loop.run_in_executor(self._accelerator, self._write, model, parts, deadline)
                except AcceleratorLostError as error:
                    self._give_up([], error)
                    raise _unavailable() from error
                if turn is None:
                    return
                began, done, part = turn
                queue_s += began - waiting_since
                if not model_s:
                    self._telemetry.record("queue", span, waiting_since, began)
                    self._metrics.queue_wait_seconds.observe(queue_s)
                self._telemetry.record("model", span, began, done, batch_size=1)
                model_s += done - began
                yield Answer(part, queue_s * 1e3, preprocess_s * 1e3, model_s * 1e3, 0.0, batch_size=1)
                waiting_since = time.monotonic()
        finally:
            self._count_queued(-1)

    def close(self) -> None:
        """Ends the threads, once what they do is done."""
        self._preparing.shutdown()
        self._accelerator.shutdown()

    def _work(self, model: RunnableModel) -> None:
        """Hands the next batch to the accelerator's thread; comes back when it is done."""
        batch = self._next_batch(model.batch_sizes)
        if not batch:
            self._working = False
            return
        started = time.monotonic()
        for job in batch:
            job.waited_s += started - job.queued
            self._telemetry.record("queue", job.span, job.queued, started)
            self._metrics.queue_wait_seconds.observe(job.waited_s)
        self._start(model, batch, functools.partial(self._run, model, batch))

    def _check_free(self) -> None:
        if self.lost.done():
            raise _unavailable()
        if self._num_queued >= self._queue_size:
            raise ResourceExhaustedError(
                f"{self._num_queued} requests wait for the accelerator, as many as may; try again later"
            )

    def _start(self, model: RunnableModel, batch: list[_Job], run: Callable[[], list[Answer | Exception]]) -> None:
        self._working = True
        future = asyncio.get_running_loop().run_in_executor(self._accelerator, run)
        future.add_done_callback(lambda done: self._deliver(model, batch, done))

    def _next_batch(self, sizes: Sequence[int]) -> list[_Job]:
        """The oldest request that is still wanted, and what is best run with it."""
        now = time.monotonic()
        wanted = [job for job in self._waiting if self._is_wanted(job, now)]
        batch = [job for job in wanted if job is wanted[0] or _may_share(wanted[0], job)][: sizes[-1]]
        if batch:
            del batch[self._pace.choose(batch[0].prepared.shape_key, len(batch), sizes) :]
        self._waiting = deque(job for job in wanted if job not in batch)
        self._count_queued(-len(batch))
        return batch

    def _is_wanted(self, job: _Job, now: float) -> bool:
        """Frees the place of one that is not."""
        if job.answer.done():  # given up a moment ago
            self._count_queued(-1)
            return False
        if job.deadline <= now:
            self._count_queued(-1)
            job.answer.set_exception(_too_late())
            return False
        return True

    def _prepare_and_run(
        self, model: RunnableModel, job: _Job, prepare: Callable[[], Prepared]
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
        return self._run(model, [job])

    def _run(self, model: RunnableModel, batch: list[_Job]) -> list[Answer | Exception]:
        """In the accelerator's thread: one model call, or, where it fails, one for each request.

        Raises:
            AcceleratorLostError: it is not the requests that are at fault.
        """
        try:
            return self._call_model(model, batch)
        except Exception as error:
            if len(batch) == 1:
                _check_accelerator(model, error)
                return [error]
            logger.warning("a batch of %d failed; running its requests one by one", len(batch), exc_info=error)
            return [answer for job in batch for answer in self._run(model, [job])]

    def _call_model(self, model: RunnableModel, batch: list[_Job]) -> list[Answer | Exception]:
        started = time.monotonic()
        outputs = model.run([job.prepared for job in batch])
        ended = time.monotonic()
        self._metrics.batch_size.observe(len(batch))
        self._metrics.model_seconds.observe(ended - started)
        rows = padded_size(len(batch), model.batch_sizes)
        self._pace.learn(batch[0].prepared.shape_key, rows, ended - started)
        answers: list[Answer | Exception] = []
        for job, output in zip(batch, outputs, strict=True):
            self._telemetry.record("model", job.span, started, ended, batch_size=len(batch))
            finishing = time.monotonic()
            try:
                result = job.finish(job.prepared, output)
            except Exception as error:
                answers.append(error)
                continue
            answers.append(
                Answer(
                    result=result,
                    queue_ms=job.waited_s * 1e3,
                    preprocess_ms=job.preprocess_s * 1e3,
                    model_ms=(ended - started) * 1e3,
                    postprocess_ms=(time.monotonic() - finishing) * 1e3,
                    batch_size=len(batch),
                )
            )
        return answers

    def _write(self, model: RunnableModel, parts: Iterator[Any], deadline: float) -> tuple[float, float, Any] | None:
        """In the accelerator's thread: the next part, and when it began and ended; None: there is none.

        Raises:
            AcceleratorLostError: it is not the request that is at fault.
        """
        if self.lost.done():
            raise _unavailable()
        began = time.monotonic()
        if deadline <= began:
            raise _too_late()
        try:
            part = next(parts, None)
        except Exception as error:
            _check_accelerator(model, error)
            raise
        if part is None:
            return None
        done = time.monotonic()
        self._metrics.batch_size.observe(1)
        self._metrics.model_seconds.observe(done - began)
        return began, done, part

    def _deliver(self, model: RunnableModel, batch: list[_Job], done: asyncio.Future[list[Answer | Exception]]) -> None:
        error = done.exception()
        if error is not None:
            self._give_up(batch, error)
            return
        self._work(model)  # first the accelerator, then the answers
        for job, answer in zip(batch, done.result(), strict=True):
            if job.answer.done():  # given up while it ran
                continue
            if isinstance(answer, Exception):
                job.answer.set_exception(answer)
            else:
                job.answer.set_result(answer)

    def _give_up(self, batch: list[_Job], error: BaseException) -> None:
        """Refuses everything from now on."""
        for job in (*batch, *self._waiting):
            if not job.answer.done():
                job.answer.set_exception(_unavailable())
        self._count_queued(-len(self._waiting))
        self._waiting.clear()
        if not self.lost.done():  # a stream and a batch may both find out
            self.lost.set_exception(error)

    def _count_queued(self, change: int) -> None:
        self._num_queued += change
        self._metrics.queue_depth.set(self._num_queued)


def _timed(prepare: Callable[[], Prepared], deadline: float) -> tuple[float, float, Any]:
    started = time.monotonic()
    if deadline <= started:
        raise _too_late()
    prepared = prepare()
    return started, time.monotonic(), prepared


def _may_share(first: _Job, other: _Job) -> bool:
    one, two = first.prepared, other.prepared
    return one.shape_key == two.shape_key and not one.deterministic and not two.deterministic


def _check_accelerator(model: RunnableModel, failure: Exception) -> None:
    """Tells a call that failed by itself from an accelerator that failed: one more call, of known-good inputs."""
    try:
        model.warm_up(model.warm_up_shapes()[:1])
    except Exception as error:
        raise AcceleratorLostError(f"the accelerator has failed: {failure}") from error


def _unavailable() -> UnavailableError:
    return UnavailableError("the accelerator has failed; the service is about to stop")


def _too_late() -> DeadlineExceededError:
    return DeadlineExceededError("the request's time ran out before the accelerator was free")
