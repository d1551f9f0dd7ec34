"""Which step of which chunk a robot carries out."""

import asyncio
import threading
from time import monotonic
from typing import Any

import numpy as np
import pytest

from openpi_flash_client import PolicyTimeoutError
from openpi_flash_client.chunks import ActionChunks, default_horizon

TIMEOUT_S = 10.0


class Chunks:
    """Gives chunks of six steps; step s of the chunk asked for at time t is [t, s]."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.deadlines: list[float] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.error: Exception | None = None

    def __call__(self, observation: Any, deadline: float) -> dict[str, Any]:
        self.deadlines.append(deadline)
        assert self.may_answer.wait(10)
        self.asked.append(int(observation["time"]))
        if self.error is not None:
            raise self.error
        return {"actions": np.array([[int(observation["time"]), step] for step in range(6)]), "timing": {}}


def drive(chunks: ActionChunks, ask: Chunks, times: range, **entries: Any) -> list[list[int]]:
    return [chunks.infer({"time": time, **entries}, ask, TIMEOUT_S)["actions"].tolist() for time in times]


def test_so_many_steps_of_each_chunk():
    ask, chunks = Chunks(), ActionChunks(3)
    assert drive(chunks, ask, range(7)) == [[0, 0], [0, 1], [0, 2], [3, 0], [3, 1], [3, 2], [6, 0]]
    assert ask.asked == [0, 3, 6]


def test_a_prefetched_chunk_goes_on_at_the_moment_it_takes_over():
    ask, chunks = Chunks(), ActionChunks(4, prefetch=2)
    taken = drive(chunks, ask, range(20))
    # Asked for at time 1, with two steps left; at time 4 its first three steps are over, and three are left.
    assert taken[:7] == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 3], [1, 4], [1, 5]]
    assert all(asked + step == time for time, (asked, step) in enumerate(taken))
    chunks.close()


def test_with_prefetch_only_the_first_chunk_is_waited_for():
    ask, chunks = Chunks(), ActionChunks(3, prefetch=1)
    drive(chunks, ask, range(1))
    ask.may_answer.clear()
    assert drive(chunks, ask, range(1, 3)) == [[0, 1], [0, 2]]
    threading.Timer(0.05, ask.may_answer.set).start()
    assert drive(chunks, ask, range(3, 4)) == [[1, 2]]
    chunks.close()


def test_a_prefetch_that_failed_is_asked_for_again_when_it_is_needed():
    ask, chunks = Chunks(), ActionChunks(3, prefetch=1)
    drive(chunks, ask, range(1))
    ask.error = RuntimeError("away")
    drive(chunks, ask, range(1, 3))
    with pytest.raises(RuntimeError, match="away"):
        drive(chunks, ask, range(3, 4))
    ask.error = None
    assert drive(chunks, ask, range(3, 4)) == [[3, 0]]
    chunks.close()


def test_a_prefetch_is_of_the_observation_as_it_was():
    ask, chunks = Chunks(), ActionChunks(3, prefetch=1)
    now = np.array(0)
    observation = {"time": now, "nested": {"time": now}}

    def ask_nested(observation: Any, deadline: float) -> dict[str, Any]:
        return ask(observation["nested"], deadline)

    chunks.infer(observation, ask_nested, TIMEOUT_S)
    now[...] = 1
    ask.may_answer.clear()
    chunks.infer(observation, ask_nested, TIMEOUT_S)  # asks for the next chunk, which does not look yet
    now[...] = 2
    chunks.infer(observation, ask_nested, TIMEOUT_S)
    ask.may_answer.set()
    assert chunks.infer(observation, ask_nested, TIMEOUT_S)["actions"].tolist() == [1, 2]
    chunks.close()


def test_a_prefetch_that_does_not_answer_is_waited_for_until_the_time_of_the_call_is_over():
    ask, chunks = Chunks(), ActionChunks(3, prefetch=1)
    drive(chunks, ask, range(1))
    ask.may_answer.clear()
    drive(chunks, ask, range(1, 3))
    with pytest.raises(PolicyTimeoutError):
        chunks.infer({"time": 3}, ask, 0.01)
    ask.may_answer.set()
    assert drive(chunks, ask, range(4, 5)) == [[4, 0]]
    chunks.close()


def test_asked_again_after_a_failed_prefetch_there_is_no_more_time_than_the_call_has():
    ask, chunks = Chunks(), ActionChunks(3, prefetch=1)
    drive(chunks, ask, range(1))
    ask.error = RuntimeError("away")
    drive(chunks, ask, range(1, 3))
    latest = monotonic() + TIMEOUT_S
    with pytest.raises(RuntimeError, match="away"):
        drive(chunks, ask, range(3, 4))
    assert latest <= ask.deadlines[-1] <= monotonic() + TIMEOUT_S
    assert ask.deadlines[1] <= latest, "a prefetch has a deadline of its own"
    chunks.close()


async def test_in_an_event_loop_too_a_prefetch_is_not_waited_for_without_end():
    chunks, cancelled = ActionChunks(3, prefetch=1), asyncio.Event()
    ask = Chunks()

    async def ask_async(observation: Any, deadline: float) -> dict[str, Any]:
        if observation["time"] == 1:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        return ask(observation, deadline)

    for moment in range(3):
        await chunks.infer_async({"time": moment}, ask_async, TIMEOUT_S)
    with pytest.raises(PolicyTimeoutError):
        await chunks.infer_async({"time": 3}, ask_async, 0.01)
    await asyncio.wait_for(cancelled.wait(), 10)
    assert (await chunks.infer_async({"time": 4}, ask_async, TIMEOUT_S))["actions"].tolist() == [4, 0]
    chunks.close()


def test_a_prefetch_that_ended_with_its_event_loop_is_asked_for_again():
    chunks, ask = ActionChunks(3, prefetch=1), Chunks()

    async def ask_async(observation: Any, deadline: float) -> dict[str, Any]:
        if observation["time"] == 1:
            await asyncio.Event().wait()
        return ask(observation, deadline)

    async def drive_async(times: range) -> list[list[int]]:
        return [(await chunks.infer_async({"time": at}, ask_async, TIMEOUT_S))["actions"].tolist() for at in times]

    asyncio.run(drive_async(range(3)))
    assert asyncio.run(drive_async(range(3, 5))) == [[3, 0], [3, 1]]
    chunks.close()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_reset_and_another_prompt_begin_anew(prefetch):
    ask, chunks = Chunks(), ActionChunks(3, prefetch=prefetch)
    drive(chunks, ask, range(2), prompt="fold")
    chunks.reset()
    assert drive(chunks, ask, range(2, 3), prompt="fold") == [[2, 0]]
    assert drive(chunks, ask, range(3, 5), prompt="open") == [[3, 0], [3, 1]]
    chunks.close()


def test_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match="open_loop_horizon: 0"):
        ActionChunks(0)
    with pytest.raises(ValueError, match="prefetch_steps: 4"):
        ActionChunks(3, prefetch=4)
    with pytest.raises(ValueError, match="open_loop_horizon: 7; the policy's chunks have 6 steps"):
        drive(ActionChunks(7), Chunks(), range(1))


def test_the_environment_sets_the_horizon(monkeypatch):
    monkeypatch.delenv("OPENPI_OPEN_LOOP_HORIZON", raising=False)
    assert default_horizon() is None
    monkeypatch.setenv("OPENPI_OPEN_LOOP_HORIZON", "8")
    assert default_horizon() == 8
    monkeypatch.setenv("OPENPI_OPEN_LOOP_HORIZON", "many")
    with pytest.raises(ValueError, match="OPENPI_OPEN_LOOP_HORIZON: 'many'"):
        default_horizon()


async def test_an_event_loop_gets_the_same_steps():
    ask, chunks = Chunks(), ActionChunks(4, prefetch=2)

    async def ask_async(observation: Any, deadline: float) -> dict[str, Any]:
        await asyncio.sleep(0)
        return ask(observation, deadline)

    taken = []
    for time in range(20):
        taken.append((await chunks.infer_async({"time": time}, ask_async, TIMEOUT_S))["actions"].tolist())
    assert taken == drive(ActionChunks(4, prefetch=2), Chunks(), range(20))
    chunks.close()


async def test_in_an_event_loop_a_prefetch_that_failed_is_asked_for_again():
    ask, chunks = Chunks(), ActionChunks(3, prefetch=1)

    async def ask_async(observation: Any, deadline: float) -> dict[str, Any]:
        return ask(observation, deadline)

    for time in range(2):
        await chunks.infer_async({"time": time}, ask_async, TIMEOUT_S)
    ask.error = RuntimeError("away")
    await chunks.infer_async({"time": 2}, ask_async, TIMEOUT_S)
    with pytest.raises(RuntimeError, match="away"):
        await chunks.infer_async({"time": 3}, ask_async, TIMEOUT_S)
    ask.error = None
    assert (await chunks.infer_async({"time": 3}, ask_async, TIMEOUT_S))["actions"].tolist() == [3, 0]
    chunks.close()
