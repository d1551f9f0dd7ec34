"""Action chunks one step at a time: `horizon` steps of each chunk are carried out before the next chunk is asked for.

With `prefetch` steps left, the next chunk is asked for in the background, from the observation of that moment. When it
takes over, its first steps lie in the past: they are left out, one for each call since.
"""

import asyncio
import concurrent.futures
import copy
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np

from openpi_flash_client.errors import PolicyTimeoutError
from openpi_flash_client.waiting import at_once, run

HORIZON_VARIABLE = "OPENPI_OPEN_LOOP_HORIZON"

Infer = Callable[[Mapping[str, Any], float], dict[str, Any]]
"""Gives a chunk for an observation before a deadline, a moment of `time.monotonic`."""
InferAsync = Callable[[Mapping[str, Any], float], Awaitable[dict[str, Any]]]

_Future = concurrent.futures.Future[dict[str, Any]] | asyncio.Future[dict[str, Any]]


def default_horizon() -> int | None:
    """The horizon that the environment names; None: none.

    Raises:
        ValueError: it is no positive number.
    """
    text = os.environ.get(HORIZON_VARIABLE, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{HORIZON_VARIABLE}: {text!r}; a positive whole number is expected")
    return int(text)


class ActionChunks:
    """Serves the steps of one robot's chunks, to a thread or to an event loop. Not for several of them at once."""

    def __init__(self, horizon: int, *, prefetch: int = 0) -> None:
        """
        Args:
            horizon: steps of a chunk that are carried out.
            prefetch: steps before the last at which the next chunk is asked for; 0: when it is needed.

        Raises:
            ValueError: a number out of range.
        """
        if horizon < 1:
            raise ValueError(f"open_loop_horizon: {horizon}; at least 1 is expected")
        if not 0 <= prefetch <= horizon:
            raise ValueError(f"prefetch_steps: {prefetch}; 0 to {horizon}, the open_loop_horizon, is expected")
        self._horizon = horizon
        self._prefetch = prefetch
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "openpi-prefetch") if prefetch else None
        self._chunk: dict[str, Any] | None = None
        self._next: _Future | None = None
        self._step = self._end = 0  # of the chunk: the next step, and the one before which the next chunk takes over
        self._age = 0  # calls since the next chunk was asked for
        self._prompt: Any = None

    def infer(self, observation: Mapping[str, Any], ask: Infer, timeout_s: float) -> dict[str, Any]:
        """The answer of one step: `actions` is a row of the chunk; everything else is as it came with the chunk.

        A changed prompt drops the chunk, for it belongs to another task.

        Args:
            observation: of this step; the caller may overwrite its arrays afterwards.
            ask: gives a chunk; also called in another thread.
            timeout_s: time that this call may take, and a chunk that is asked for ahead.

        Raises:
            ValueError: the policy's chunks are shorter than the horizon.
            PolicyTimeoutError: a chunk that was asked for ahead has not come in this call's time.
            PolicyError: there is no chunk, and why.
        """

        def begin(later: Mapping[str, Any], deadline: float) -> _Future:
            assert self._executor is not None  # noqa: S101 - there is a prefetch
            return self._executor.submit(ask, later, deadline)

        return run(self._infer(observation, at_once(ask), timeout_s, begin, at_once(concurrent.futures.wait)))

    async def infer_async(self, observation: Mapping[str, Any], ask: InferAsync, timeout_s: float) -> dict[str, Any]:
        """`infer` for an event loop: the next chunk is asked for in a task of its own."""

        def begin(later: Mapping[str, Any], deadline: float) -> _Future:
            task = asyncio.ensure_future(ask(later, deadline))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # then it is asked for again
            return task

        return await self._infer(observation, ask, timeout_s, begin, asyncio.wait)

    def reset(self) -> None:
        """Drops the chunk, and the one that was asked for."""
        asked, self._chunk, self._next = self._next, None, None
        if asked is not None:
            asked.cancel()

    def close(self) -> None:
        """Waits for nothing; what was asked for is dropped."""
        self.reset()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    async def _infer(
        self,
        observation: Mapping[str, Any],
        ask: InferAsync,
        timeout_s: float,
        begin: Callable[[Mapping[str, Any], float], _Future],
        wait: Callable[..., Awaitable[object]],
    ) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        prompt = observation.get("prompt")
        if not _equal(prompt, self._prompt):
            self.reset()
            self._prompt = prompt
        if self._chunk is None or self._step >= self._end:
            await self._take_over(observation, ask, deadline, wait)
        chunk, step = self._chunk, self._step
        assert chunk is not None  # noqa: S101 - taken over above, or raised
        self._step += 1
        if self._next is not None:
            self._age += 1
        elif self._prefetch and self._step >= self._end - self._prefetch:
            self._next = begin(copy.deepcopy(dict(observation)), time.monotonic() + timeout_s)
            self._age = 1
        return {**chunk, "actions": chunk["actions"][step]}

    async def _take_over(
        self,
        observation: Mapping[str, Any],
        ask: InferAsync,
        deadline: float,
        wait: Callable[..., Awaitable[object]],
    ) -> None:
        asked, self._next, self._chunk = self._next, None, None
        chunk, first = None, 0
        if asked is not None:
            try:
                if not asked.done():
                    await wait([asked], timeout=max(0.0, deadline - time.monotonic()))
                if not asked.done():
                    raise PolicyTimeoutError("no answer in time to the request for the next chunk")
            finally:
                asked.cancel()
            if not asked.cancelled() and asked.exception() is None:  # else it is asked for again, and is the caller's
                chunk, first = asked.result(), self._age
        if chunk is None or first >= len(chunk["actions"]):
            chunk, first = await ask(observation, deadline), 0
        length = len(chunk["actions"])
        if self._horizon > length:
            raise ValueError(f"open_loop_horizon: {self._horizon}; the policy's chunks have {length} steps")
        self._chunk, self._step, self._end = chunk, first, min(first + self._horizon, length)


def _equal(one: Any, other: Any) -> bool:
    return bool(np.all(np.asarray(one) == np.asarray(other)))
