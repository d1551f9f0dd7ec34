"""Cadences and sessions, on a clock that the tests move."""

import asyncio
from typing import Any

import pytest
from openpi_flash.v1 import planner_pb2
from openpi_flash_common.errors import UnavailableError
from openpi_flash_common.settings import PlannerSettings

from openpi_flash_gateway import subtasks
from openpi_flash_gateway.subtasks import FAILED, FRESH, PENDING, REUSED, Choice, Subtasks


class Bench:
    """A cadence, and a planner that writes `1`, `2` and so on when it is let."""

    def __init__(self, **settings: Any) -> None:
        self.now = 1000.0
        self.hold = asyncio.Event()
        self.hold.set()
        self.error: Exception | None = None
        self.num_asked = 0
        self.num_cancelled = 0
        planner = PlannerSettings(checkpoint_dir="nowhere", **{"background_interval_ms": 0, **settings})
        self.subtasks = Subtasks(planner, background_timeout_s=30, clock=lambda: self.now)

    async def choose(self, session_id: str = "robot", task: str = "task", *, time_s: float = 5.0) -> Choice:
        choice = await self.subtasks.choose(session_id, task, self.now + time_s, self._generate)
        choice.then()
        return choice

    async def settle(self) -> None:
        """Lets what can finish do so."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def _generate(self, _: float) -> planner_pb2.GenerateSubtaskResponse:
        self.num_asked += 1
        text = str(self.num_asked)
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return planner_pb2.GenerateSubtaskResponse(text=text, ms=2.0, action_prompt=f"do {text}")


def seen(choice: Choice) -> tuple[int, str, str]:
    return choice.subtask.status, choice.subtask.text, choice.action_prompt


async def test_every_request_writes_a_subtask_of_its_own():
    bench = Bench()
    assert [seen(await bench.choose()) for _ in range(2)] == [(FRESH, "1", "do 1"), (FRESH, "2", "do 2")]
    bench.error = UnavailableError("away")
    failed = await bench.choose()
    assert (failed.subtask.status, failed.subtask.error, failed.action_prompt) == (FAILED, "UNAVAILABLE: away", "")
    bench.error = None
    assert seen(await bench.choose()) == (FRESH, "4", "do 4")


@pytest.mark.parametrize("cadence", ["every_request", {"interval_ms": 1000}])
async def test_a_planner_that_is_too_slow_costs_the_action_its_subtask_alone(cadence):
    bench = Bench(cadence=cadence, timeout_ms=20)
    bench.hold.clear()
    choice = await bench.choose()
    assert (choice.subtask.status, choice.action_prompt) == (FAILED, "")
    assert "not answered in time" in choice.subtask.error
    await bench.settle()


async def test_a_request_with_no_time_left_does_not_wait_for_a_subtask():
    bench = Bench()
    bench.hold.clear()
    assert (await bench.choose(time_s=-1.0)).subtask.status == FAILED


async def test_an_action_that_is_given_up_takes_its_subtask_with_it():
    bench = Bench()
    bench.hold.clear()
    asking = asyncio.ensure_future(bench.choose())
    await bench.settle()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert (bench.num_asked, bench.num_cancelled) == (1, 1)


async def test_within_an_interval_the_subtask_is_reused():
    bench = Bench(cadence={"interval_ms": 1000})
    assert seen(await bench.choose()) == (FRESH, "1", "do 1")
    bench.now += 0.9
    reused = await bench.choose()
    assert seen(reused) == (REUSED, "1", "do 1")
    assert reused.subtask.age_ms == pytest.approx(900)
    assert seen(await bench.choose("another robot")) == (FRESH, "2", "do 2")
    bench.now += 0.2
    assert seen(await bench.choose()) == (FRESH, "3", "do 3")


async def test_requests_of_a_session_share_the_subtask_that_is_being_written():
    bench = Bench(cadence={"interval_ms": 1000})
    bench.hold.clear()
    first, second = (asyncio.ensure_future(bench.choose()) for _ in range(2))
    await bench.settle()
    first.cancel()
    bench.hold.set()
    assert seen(await second) == (FRESH, "1", "do 1")
    assert bench.num_asked == 1


async def test_within_an_interval_a_planner_that_failed_is_left_alone():
    bench = Bench(cadence={"interval_ms": 1000})
    await bench.choose()
    bench.now += 1.1
    bench.error = UnavailableError("away")
    assert (await bench.choose()).subtask.error == "UNAVAILABLE: away"
    bench.now += 0.5
    bench.error = None
    still = await bench.choose()
    assert (still.subtask.status, still.subtask.error, bench.num_asked) == (FAILED, "UNAVAILABLE: away", 2)
    bench.now += 0.6
    assert seen(await bench.choose()) == (FRESH, "3", "do 3")


async def test_in_the_background_nothing_waits_and_the_newest_finished_subtask_is_used():
    bench = Bench(cadence="background")
    bench.hold.clear()
    assert seen(await bench.choose()) == (PENDING, "", "")
    assert seen(await bench.choose()) == (PENDING, "", "")
    await bench.settle()
    assert bench.num_asked == 1
    bench.hold.set()
    await bench.settle()
    bench.hold.clear()
    bench.now += 0.25
    reused = await bench.choose()
    assert (seen(reused), reused.subtask.age_ms) == ((REUSED, "1", "do 1"), 250)
    await bench.settle()
    assert bench.num_asked == 2  # the next one is on its way
    assert seen(await bench.choose()) == (REUSED, "1", "do 1")
    bench.hold.set()
    await bench.settle()
    assert seen(await bench.choose()) == (REUSED, "2", "do 2")


async def test_in_the_background_subtasks_keep_their_distance_and_begin_when_the_action_is_there():
    bench = Bench(cadence="background", background_interval_ms=500)
    choice = await bench.subtasks.choose("robot", "task", bench.now + 5, bench._generate)
    await bench.settle()
    assert bench.num_asked == 0
    choice.then()
    await bench.settle()
    for later_s, num_asked in ((0.0, 1), (0.4, 1), (0.2, 2), (0.4, 2)):
        bench.now += later_s
        await bench.choose()
        await bench.settle()
        assert bench.num_asked == num_asked


async def test_an_action_that_ends_after_its_sessions_reset_begins_nothing():
    bench = Bench(cadence="background")
    choice = await bench.subtasks.choose("robot", "task", bench.now + 5, bench._generate)
    bench.subtasks.forget("robot")
    choice.then()
    await bench.settle()
    assert bench.num_asked == 0


async def test_in_the_background_a_failure_is_told_beside_the_old_subtask_until_that_is_too_old():
    bench = Bench(cadence="background", max_age_ms=2500)
    await bench.choose()
    await bench.settle()
    bench.error = UnavailableError("away")
    await bench.choose()
    await bench.settle()
    old = await bench.choose()
    assert (seen(old), old.subtask.error) == ((REUSED, "1", "do 1"), "UNAVAILABLE: away")
    assert bench.num_asked == 2  # not tried again at once
    bench.now += 1.0
    await bench.choose()
    await bench.settle()
    assert bench.num_asked == 3
    bench.now += 1.6
    too_old = await bench.choose()
    assert (seen(too_old), too_old.subtask.error) == ((FAILED, "", ""), "UNAVAILABLE: away")
    bench.error = None
    await bench.settle()
    bench.now += 1.1
    await bench.choose()
    await bench.settle()
    assert seen(await bench.choose())[0] == REUSED  # fresh ones come back by themselves


async def test_a_subtask_that_grew_old_while_the_robot_paused_is_not_used():
    bench = Bench(cadence="background", max_age_ms=2500)
    await bench.choose()
    await bench.settle()
    bench.now += 3.0
    paused = await bench.choose()
    assert paused.subtask.status == FAILED
    assert "3.0 s old" in paused.subtask.error
    await bench.settle()
    assert seen(await bench.choose()) == (REUSED, "2", "do 2")


@pytest.mark.parametrize("cadence", ["background", {"interval_ms": 100_000}])
@pytest.mark.parametrize("change", ["task", "reset"])
async def test_a_changed_task_or_a_reset_invalidates_the_subtask_at_once(cadence, change):
    bench = Bench(cadence=cadence)
    await bench.choose()
    await bench.settle()
    bench.now += 0.1
    assert seen(await bench.choose()) == (REUSED, "1", "do 1")
    await bench.settle()
    if change == "reset":
        bench.subtasks.forget("robot")
    choice = await bench.choose(task="other" if change == "task" else "task")
    assert choice.subtask.status == (PENDING if cadence == "background" else FRESH)
    assert choice.subtask.text != "1"


async def test_a_subtask_that_was_being_written_at_a_reset_is_never_used():
    bench = Bench(cadence="background")
    bench.hold.clear()
    await bench.choose()
    await bench.settle()
    bench.subtasks.forget("robot")
    bench.hold.set()
    await bench.settle()
    assert bench.num_cancelled == 1
    assert seen(await bench.choose()) == (PENDING, "", "")


async def test_a_reset_while_an_action_waits_for_the_subtask():
    bench = Bench(cadence={"interval_ms": 1000})
    bench.hold.clear()
    waiting = asyncio.ensure_future(bench.choose())
    await bench.settle()
    bench.subtasks.forget("robot")
    choice = await waiting
    assert choice.subtask.status == FAILED
    assert "reset" in choice.subtask.error


@pytest.mark.parametrize("cadence", ["background", {"interval_ms": 1000}])
async def test_without_a_session_nothing_is_reused(cadence):
    bench = Bench(cadence=cadence)
    assert [seen(await bench.choose("")) for _ in range(2)] == [(FRESH, "1", "do 1"), (FRESH, "2", "do 2")]


async def test_a_planner_that_writes_nothing_has_failed():
    bench = Bench()

    async def generate(_: float) -> planner_pb2.GenerateSubtaskResponse:
        return planner_pb2.GenerateSubtaskResponse(num_tokens=1)

    choice = await bench.subtasks.choose("robot", "task", bench.now + 5, generate)
    assert (choice.subtask.status, choice.subtask.error) == (FAILED, "INTERNAL: the planner wrote nothing")


async def test_the_session_that_was_silent_longest_makes_room(monkeypatch):
    monkeypatch.setattr(subtasks, "_MAX_SESSIONS", 2)
    bench = Bench(cadence={"interval_ms": 1000})
    for session_id in ("a", "b", "a", "c"):
        await bench.choose(session_id)
    assert bench.num_asked == 3
    statuses = {session_id: (await bench.choose(session_id)).subtask.status for session_id in ("a", "c", "b")}
    assert statuses == {"a": REUSED, "c": REUSED, "b": FRESH}
