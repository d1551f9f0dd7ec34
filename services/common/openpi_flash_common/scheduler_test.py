"""What is promised about waiting: order, batches, bounds, deadlines, cancellation, and faults that stay their own."""

import asyncio
import dataclasses
import math
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

import numpy as np
import pytest

from openpi_flash_common.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from openpi_flash_common.scheduler import AcceleratorLostError, Answer, Pace, Scheduler
from openpi_flash_common.telemetry import NO_TRACE, Span, Telemetry

QUEUE_SIZE = 6


@dataclasses.dataclass(frozen=True)
class Request:
    name: str
    shape_key: str = "shape"
    deterministic: bool = False
    poison: str = ""
    """Where it fails: `run`, `finish` or nowhere."""


class GatedPolicy:
    """Each model call is noted and waits for the gate. A request's actions are its name's length."""

    batch_sizes = (1, 2, 4)

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.gate = threading.Event()
        self.is_broken = False
        self.threads: set[int] = set()

    def run(self, prepared: list[Request]) -> list[np.ndarray]:
        self.threads.add(threading.get_ident())
        self.calls.append([request.name for request in prepared])
        assert self.gate.wait(30)
        if any(request.poison == "run" for request in prepared):
            raise RuntimeError("the model failed")
        return [np.full(2, len(request.name)) for request in prepared]

    def finish(self, prepared: Request, model_actions: np.ndarray) -> dict[str, np.ndarray]:
        if prepared.poison == "finish":
            raise RuntimeError("not finite")
        return {"actions": model_actions}

    def warm_up_shapes(self) -> list[str]:
        return ["small", "large"]

    def warm_up(self, shapes: list[str]) -> None:
        assert shapes == ["small"]
        if self.is_broken:
            raise RuntimeError("device lost")


class Harness:
    def __init__(self) -> None:
        self.policy = GatedPolicy()
        self.scheduler = Scheduler(QUEUE_SIZE, Telemetry())

    def submit(self, request: Request | str, deadline: float = math.inf) -> asyncio.Task[Answer]:
        return self.submit_prepare(lambda: Request(request) if isinstance(request, str) else request, deadline)

    def submit_prepare(self, prepare: Callable[[], Request], deadline: float = math.inf) -> asyncio.Task[Answer]:
        policy = self.policy
        return asyncio.ensure_future(self.scheduler.infer(policy, prepare, deadline, Span(NO_TRACE), policy.finish))

    def stream(
        self, name: str, num_parts: int, poison: str = "", deadline: float = math.inf
    ) -> AsyncGenerator[Answer, None]:
        """Parts are `name 0`, `name 1`, …; each is a call and waits for the gate."""

        def write(prepared: Request) -> Iterator[str]:
            for i in range(num_parts):
                part = f"{prepared.name} {i}"
                self.policy.run([Request(part, poison="run" if part == poison else "")])
                yield part

        return self.scheduler.stream(self.policy, lambda: Request(name), deadline, Span(NO_TRACE), write)

    async def occupy(self) -> asyncio.Task[Answer]:
        """Has the accelerator work on a request named `first` until the gate opens."""
        first = self.submit("first")
        await self.until(lambda: self.policy.calls == [["first"]])
        return first

    async def submit_waiting(self, *requests: Request | str, deadline: float = math.inf) -> list[asyncio.Task[Answer]]:
        """Submits requests one after the other, so that they wait in this order."""
        tasks = []
        for request in requests:
            waiting = len(self.scheduler._waiting)
            tasks.append(self.submit(request, deadline))
            await self.until(lambda waiting=waiting: len(self.scheduler._waiting) == waiting + 1)
        return tasks

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.001)


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    harness = Harness()
    yield harness
    harness.policy.gate.set()
    await harness.until(lambda: not harness.scheduler._working or harness.scheduler.lost.done())
    assert harness.scheduler._num_queued == 0
    harness.scheduler.close()


async def test_a_lone_request_runs_at_once_and_its_times_are_told(harness):
    harness.policy.gate.set()
    answer = await harness.submit("lone")
    np.testing.assert_array_equal(answer.result["actions"], [4, 4])
    assert answer.batch_size == 1
    assert min(answer.queue_ms, answer.preprocess_ms, answer.model_ms, answer.postprocess_ms) >= 0


async def test_times_are_of_what_they_say(harness):
    def prepare() -> Request:
        time.sleep(0.02)
        return Request("slow")

    first = await harness.occupy()
    second = harness.submit_prepare(prepare)
    await harness.until(lambda: len(harness.scheduler._waiting) == 1)
    await asyncio.sleep(0.03)
    harness.policy.gate.set()
    assert (await first).model_ms >= 30
    answer = await second
    assert answer.preprocess_ms >= 20
    assert answer.queue_ms >= 30
    assert answer.model_ms < answer.queue_ms


async def test_waiting_requests_of_one_shape_share_model_calls(harness):
    tasks = [await harness.occupy(), *await harness.submit_waiting("b", "c", "d", "e", "f")]
    harness.policy.gate.set()
    answers = await asyncio.gather(*tasks)
    assert harness.policy.calls == [["first"], ["b", "c", "d", "e"], ["f"]]
    assert [answer.batch_size for answer in answers] == [1, 4, 4, 4, 4, 1]
    assert len(harness.policy.threads) == 1


SIZES = (1, 2, 4, 8, 16)


def pace_of(seconds: Callable[[int], float], sizes: tuple[int, ...] = SIZES) -> Pace:
    pace = Pace()
    for rows in sizes:
        pace.learn("shape", rows, 1e9)  # compiles
        pace.learn("shape", rows, seconds(rows))
    return pace


def test_as_many_run_together_as_give_the_most_per_second():
    by_the_row = pace_of(lambda rows: 6 + 6.1 * rows)  # two keep the accelerator busy
    assert [by_the_row.choose("shape", waiting, SIZES) for waiting in (1, 2, 3, 5, 8, 9, 16)] == [1, 2, 2, 4, 8, 8, 16]
    all_at_once = pace_of(lambda rows: 12 + 0.1 * rows)  # sixteen do not
    assert [all_at_once.choose("shape", waiting, SIZES) for waiting in (1, 3, 5, 9, 15)] == [1, 3, 5, 9, 15]


def test_what_is_not_known_of_a_shape_is_tried():
    pace = pace_of(lambda rows: 1 + rows, sizes=(1, 2, 4))
    assert pace.choose("shape", 3, SIZES) == 2
    assert pace.choose("shape", 5, SIZES) == 5
    assert pace.choose("another shape", 3, SIZES) == 3


def test_the_pace_follows_what_calls_take_now():
    pace = pace_of(lambda rows: rows)
    assert pace.choose("shape", 5, SIZES) == 4
    for _ in range(20):
        pace.learn("shape", 8, 1.0)
    assert pace.choose("shape", 5, SIZES) == 5


async def test_what_is_left_for_the_next_call_keeps_its_place(harness):
    harness.scheduler._pace = pace_of(lambda rows: 1e6 * rows**2, harness.policy.batch_sizes)
    await harness.occupy()
    waiting = await harness.submit_waiting("a", Request("x", "other"), "b", "c", "d")
    waiting[-1].cancel()
    await harness.until(lambda: len(harness.scheduler._waiting) == 4)
    harness.policy.gate.set()
    await asyncio.gather(*waiting[:-1])
    assert harness.policy.calls == [["first"], ["a", "b"], ["x"], ["c"]]


async def test_shapes_do_not_mix_and_the_oldest_goes_first(harness):
    tasks = [await harness.occupy()]
    tasks += await harness.submit_waiting(Request("b", "x"), Request("c", "y"), Request("d", "x"), Request("e", "y"))
    harness.policy.gate.set()
    await asyncio.gather(*tasks)
    assert harness.policy.calls == [["first"], ["b", "d"], ["c", "e"]]


async def test_deterministic_requests_run_alone(harness):
    first = await harness.occupy()
    tasks = await harness.submit_waiting(
        Request("b"), Request("c", deterministic=True), Request("d"), Request("e", deterministic=True)
    )
    harness.policy.gate.set()
    await asyncio.gather(first, *tasks)
    assert harness.policy.calls == [["first"], ["b", "d"], ["c"], ["e"]]


async def test_beyond_the_queue_requests_are_refused_at_once(harness):
    tasks = [await harness.occupy(), *await harness.submit_waiting(*"abcdef")]
    with pytest.raises(ResourceExhaustedError, match="6 requests wait"):
        await harness.submit("one too many")
    harness.policy.gate.set()
    await asyncio.gather(*tasks)
    assert (await harness.submit("later")).batch_size == 1


async def test_requests_being_prepared_count_as_waiting(harness):
    hold = threading.Event()

    def prepare() -> Request:
        assert hold.wait(30)
        return Request("held")

    tasks = [await harness.occupy(), *(harness.submit_prepare(prepare) for _ in range(QUEUE_SIZE))]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhaustedError):
        await harness.submit("one too many")
    hold.set()
    harness.policy.gate.set()
    await asyncio.gather(*tasks)


async def test_bad_input_of_a_lone_request_leaves_the_accelerator_free(harness):
    def prepare() -> Request:
        raise ValueError("no camera")

    with pytest.raises(ValueError, match="no camera"):
        await harness.submit_prepare(prepare)
    harness.policy.gate.set()
    assert (await harness.submit("next")).batch_size == 1
    assert harness.policy.calls == [["next"]]


async def test_a_lone_request_that_expires_or_is_cancelled_while_prepared_never_runs(harness):
    started, hold = threading.Event(), threading.Event()

    def prepare() -> Request:
        started.set()
        assert hold.wait(30)
        return Request("late")

    cancelled = harness.submit_prepare(prepare)
    await harness.until(started.is_set)
    cancelled.cancel()
    hold.set()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    harness.policy.gate.set()
    deadline = time.monotonic() + 0.2
    with pytest.raises(DeadlineExceededError):
        await harness.submit_prepare(lambda: time.sleep(0.4) or Request("late"), deadline)
    assert (await harness.submit("next")).batch_size == 1
    assert harness.policy.calls == [["next"]]


async def test_bad_input_is_refused_while_the_accelerator_is_busy(harness):
    def prepare() -> Request:
        raise ValueError("no camera")

    await harness.occupy()
    with pytest.raises(ValueError, match="no camera"):
        await asyncio.wait_for(harness.submit_prepare(prepare), 20)
    assert not harness.policy.gate.is_set()


async def test_what_expires_while_it_waits_never_reaches_the_accelerator(harness):
    first = await harness.occupy()
    deadline = time.monotonic() + 1
    (late,) = await harness.submit_waiting("late", deadline=deadline)
    (kept,) = await harness.submit_waiting("kept")
    await harness.until(lambda: time.monotonic() > deadline)
    harness.policy.gate.set()
    with pytest.raises(DeadlineExceededError):
        await late
    await asyncio.gather(first, kept)
    assert harness.policy.calls == [["first"], ["kept"]]


async def test_what_has_expired_on_arrival_is_not_even_prepared(harness):
    prepared = []
    with pytest.raises(DeadlineExceededError):
        await harness.submit_prepare(lambda: prepared.append(1) or Request("x"), time.monotonic() - 1)
    assert not prepared


async def test_what_is_cancelled_while_it_waits_never_reaches_the_accelerator_and_frees_its_place(harness):
    first = await harness.occupy()
    tasks = await harness.submit_waiting(*"abcdef")
    tasks[2].cancel()
    await asyncio.wait({tasks[2]})
    tasks += await harness.submit_waiting("g")
    harness.policy.gate.set()
    await asyncio.gather(first, *tasks, return_exceptions=True)
    assert harness.policy.calls == [["first"], ["a", "b", "d", "e"], ["f", "g"]]
    assert tasks[2].cancelled()


async def test_cancelling_and_expiring_in_the_same_moment_is_no_fault(harness):
    first = await harness.occupy()
    deadline = time.monotonic() + 1
    (late,) = await harness.submit_waiting("late", deadline=deadline)
    (kept,) = await harness.submit_waiting("kept")
    await harness.until(lambda: time.monotonic() > deadline)
    late.cancel()
    harness.policy.gate.set()
    await asyncio.gather(first, kept)
    with pytest.raises(asyncio.CancelledError):
        await late


async def test_what_is_cancelled_while_it_runs_takes_nothing_along(harness):
    first = await harness.occupy()
    (second,) = await harness.submit_waiting("second")
    first.cancel()
    harness.policy.gate.set()
    np.testing.assert_array_equal((await second).result["actions"], [6, 6])
    assert first.cancelled()


@pytest.mark.parametrize("poison", ["run", "finish"])
async def test_a_request_that_fails_in_a_batch_fails_alone(harness, poison):
    first = await harness.occupy()
    tasks = await harness.submit_waiting("a", Request("bad", poison=poison), "c")
    harness.policy.gate.set()
    results = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["Answer", "Answer", "RuntimeError", "Answer"]
    assert harness.policy.calls[1] == ["a", "bad", "c"]
    assert (harness.policy.calls[2:] == [["a"], ["bad"], ["c"]]) == (poison == "run")
    assert (await harness.submit("after")).batch_size == 1


async def test_an_accelerator_that_is_lost_refuses_all_that_waits_and_says_so(harness):
    harness.policy.is_broken = True
    first = harness.submit(Request("bad", poison="run"))
    await harness.until(lambda: len(harness.policy.calls) == 1)
    (waiting,) = await harness.submit_waiting("waiting")
    harness.policy.gate.set()
    for task in (first, waiting, harness.submit("later")):
        with pytest.raises(UnavailableError):
            await task
    with pytest.raises(AcceleratorLostError, match="the model failed"):
        await harness.scheduler.lost
    assert harness.policy.calls == [["bad"]]


async def test_a_stream_gives_its_parts_in_order_and_its_times_so_far(harness):
    harness.policy.gate.set()
    answers = [answer async for answer in harness.stream("s", 3)]
    assert [answer.result for answer in answers] == ["s 0", "s 1", "s 2"]
    times = [(answer.queue_ms, answer.model_ms) for answer in answers]
    assert times == sorted(times)
    assert {(answer.preprocess_ms, answer.batch_size) for answer in answers} == {(answers[0].preprocess_ms, 1)}


async def test_between_two_parts_of_a_stream_others_have_their_turn(harness):
    stream = asyncio.ensure_future(_results(harness.stream("s", 3)))
    await harness.until(lambda: harness.policy.calls == [["s 0"]])
    other = asyncio.ensure_future(_results(harness.stream("t", 3)))
    await harness.until(lambda: harness.scheduler._accelerator._work_queue.qsize() == 1)
    batch = harness.submit("b")
    await harness.until(lambda: harness.scheduler._working)
    harness.policy.gate.set()
    assert (await batch).batch_size == 1
    assert (await stream, await other) == (["s 0", "s 1", "s 2"], ["t 0", "t 1", "t 2"])
    assert [names[0] for names in harness.policy.calls] == ["s 0", "t 0", "b", "s 1", "t 1", "s 2", "t 2"]


async def test_a_stream_takes_a_place_until_it_ends_or_nobody_asks(harness):
    harness.policy.gate.set()
    streams = [harness.stream(str(i), 9) for i in range(QUEUE_SIZE)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(ResourceExhaustedError):
        await anext(harness.stream("one too many", 1))
    with pytest.raises(ResourceExhaustedError):
        await harness.submit("one too many")
    for stream in streams:
        await stream.aclose()
    assert harness.policy.calls == [[f"{i} 0"] for i in range(QUEUE_SIZE)]
    assert (await harness.submit("later")).batch_size == 1


async def test_a_streams_deadline_holds_between_its_parts(harness):
    harness.policy.gate.set()
    deadline = time.monotonic() + 1
    stream = harness.stream("s", 3, deadline=deadline)
    await anext(stream)
    await harness.until(lambda: time.monotonic() > deadline)
    with pytest.raises(DeadlineExceededError):
        await anext(stream)
    assert harness.policy.calls == [["s 0"]]


async def test_a_stream_that_fails_fails_alone(harness):
    harness.policy.gate.set()
    stream = harness.stream("s", 3, poison="s 1")
    await anext(stream)
    with pytest.raises(RuntimeError, match="the model failed"):
        await anext(stream)
    assert await _results(harness.stream("t", 2)) == ["t 0", "t 1"]


async def test_a_stream_that_finds_the_accelerator_lost_says_so(harness):
    harness.policy.is_broken = True
    harness.policy.gate.set()
    with pytest.raises(UnavailableError):
        await anext(harness.stream("s", 3, poison="s 0"))
    for later in (harness.submit("b"), anext(harness.stream("t", 1))):
        with pytest.raises(UnavailableError):
            await later
    with pytest.raises(AcceleratorLostError, match="the model failed"):
        await harness.scheduler.lost
    assert harness.policy.calls == [["s 0"]]


async def _results(stream: AsyncGenerator[Answer, None]) -> list[str]:
    return [answer.result async for answer in stream]
