"""Real-time chunking for a robot: its steps never wait for a chunk, and each chunk continues the one before.

While the robot carries out a chunk, the next one is asked for in the background, and the server is told which steps
will be over by the time it is there: the latency that was measured, in steps of the control rate. Server's side and
papers: docs/real-time-chunking.md.
"""

import collections
import concurrent.futures
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import numpy as np

from openpi_flash_client.errors import FailedPreconditionError

_MEASURED_LATENCIES = 10


class ChunkPolicy(Protocol):
    """What is asked for whole chunks: GrpcPolicy or FlashTransportPolicy, without an open_loop_horizon."""

    def infer(self, obs: Mapping[str, Any], **options: Any) -> dict[str, Any]: ...
    def get_server_metadata(self) -> dict[str, Any]: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...


class RealTimePolicy:
    """Gives one step of the newest chunk per call, to be called once per period of the control rate, by one thread.

    Attributes:
        delay: steps that the next request is expected to take: the longest of the last ten measured latencies.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        *,
        control_hz: float,
        execution_horizon: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            policy: gives chunks; it is used from another thread, too, and closed with this one.
            control_hz: how often `infer` is called, in calls a second.
            execution_horizon: steps of a chunk that are carried out, at least, before the next one is asked for; more
                where the latency is longer.
            clock: seconds.

        Raises:
            ValueError: a number out of range.
            FailedPreconditionError: the server does not continue chunks.
            PolicyError: the server did not answer.
        """
        if not 0 < control_hz < math.inf:
            raise ValueError(f"control_hz: {control_hz}; a positive number is expected")
        if execution_horizon < 1:
            raise ValueError(f"execution_horizon: {execution_horizon}; at least 1 is expected")
        if not policy.get_server_metadata().get("real_time_chunking"):
            raise FailedPreconditionError("the server does not continue chunks: action.real_time_chunking is off")
        self._policy = policy
        self._control_hz = control_hz
        self._execution_horizon = execution_horizon
        self._clock = clock
        self._latencies: collections.deque[float] = collections.deque(maxlen=_MEASURED_LATENCIES)
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "openpi-real-time")
        self._prompt: Any = ""
        self._chunk: dict[str, Any] | None = None
        self._step = 0  # of the chunk, the next
        self._next: concurrent.futures.Future[tuple[dict[str, Any], float]] | None = None
        self._age = 0  # steps since the next chunk was asked for

    @property
    def delay(self) -> int:
        return math.ceil(max(self._latencies, default=0.0) * self._control_hz)

    def infer(self, obs: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """The answer of one step: `actions` is a row of the chunk; everything else is as it came with the chunk.

        It waits for the first chunk, and where a chunk is at its end before the next one is there. A changed prompt
        drops the chunk, for it belongs to another task. A request that failed in the background is made again.

        Args:
            obs: of this step; see `policy.infer`, as for the options.

        Raises:
            PolicyError: there is no chunk, and why.
            ValueError: the policy gives steps, and no chunks.
        """
        prompt = obs.get("prompt", "")
        if not np.array_equal(prompt, self._prompt):
            self._drop()
            self._prompt = prompt
        if self._next is not None and self._next.done():
            self._take_over()
        if self._chunk is None or self._step >= len(self._chunk["actions"]):
            self._wait(obs, options)
        chunk, step = self._chunk, self._step
        assert chunk is not None  # noqa: S101 - waited for above, or raised
        delay = self.delay
        if self._next is None and step >= max(self._execution_horizon, delay):
            continued = {
                "previous_actions": chunk["actions"],
                "inference_delay": min(delay, len(chunk["actions"]) - step),
                "execution_horizon": step,
            }
            self._next = self._executor.submit(self._ask, {**obs, **continued}, options)
            self._age = 0
        self._step += 1
        self._age += 1
        return {**chunk, "actions": chunk["actions"][step]}

    def reset(self) -> None:
        """Makes the server forget this robot's session, and drops the chunk.

        Raises:
            PolicyError: the server did not do so.
        """
        self._drop()
        self._policy.reset()

    def close(self) -> None:
        """Waits for nothing; what was asked for is dropped."""
        self._drop()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._policy.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, obs: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        """A chunk, and the seconds that it took."""
        started = self._clock()
        chunk = self._policy.infer(obs, **options)
        latency = self._clock() - started
        if np.ndim(chunk["actions"]) != 2:
            raise ValueError("the policy gives single steps; one without an open_loop_horizon is expected")
        return chunk, latency

    def _take_over(self) -> None:
        """The chunk that was asked for becomes the chunk, unless it failed: then another one is asked for."""
        asked, self._next = self._next, None
        assert asked is not None  # noqa: S101 - the callers' condition
        if asked.exception() is None:
            chunk, latency = asked.result()
            self._latencies.append(latency)
            if self._age < len(chunk["actions"]):
                self._chunk, self._step = chunk, self._age

    def _wait(self, obs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        ended, self._chunk = self._chunk, None
        if self._next is not None and ended is not None:
            self._take_over()  # waits
        if self._chunk is None:
            self._chunk, latency = self._ask(obs, options)
            self._latencies.append(latency)
            self._step = 0

    def _drop(self) -> None:
        asked, self._chunk, self._next = self._next, None, None
        if asked is not None:
            asked.cancel()
