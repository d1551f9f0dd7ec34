"""Which step of which chunk a robot carries out."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from openpi_flash_client.chunks import ActionChunks, default_horizon


class Chunks:
    """Gives chunks of six steps; step s of the chunk asked for at time t is [t, s]."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.error: Exception | None = None

    def __call__(self, observation: Any) -> dict[str, Any]:
        self.asked.append(observation["time"])
        assert self.may_answer.wait(10)
        if self.error is not None:
            raise self.error
        return {"actions": np.array([[observation["time"], step] for step in range(6)]), "timing": {}}


def drive(chunks: ActionChunks, ask: Chunks, times: range, **entries: Any) -> list[list[int]]:
    return [chunks.infer({"time": time, **entries}, ask)["actions"].tolist() for time in times]


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

    async def ask_async(observation: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        return ask(observation)

    taken = []
    for time in range(20):
        taken.append((await chunks.infer_async({"time": time}, ask_async))["actions"].tolist())
    assert taken == drive(ActionChunks(4, prefetch=2), Chunks(), range(20))
    chunks.close()


async def test_in_an_event_loop_a_prefetch_that_failed_is_asked_for_again():
    ask, chunks = Chunks(), ActionChunks(3, prefetch=1)

    async def ask_async(observation: Any) -> dict[str, Any]:
        return ask(observation)

    for time in range(2):
        await chunks.infer_async({"time": time}, ask_async)
    ask.error = RuntimeError("away")
    await chunks.infer_async({"time": 2}, ask_async)
    with pytest.raises(RuntimeError, match="away"):
        await chunks.infer_async({"time": 3}, ask_async)
    ask.error = None
    assert (await chunks.infer_async({"time": 3}, ask_async))["actions"].tolist() == [3, 0]
    chunks.close()
