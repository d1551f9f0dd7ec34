"""One long-lived InferStream, with one request on it at a time, and the clock that ends requests out of time."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from openpi_flash_client.errors import PolicyError, PolicyTimeoutError, UnavailableError, from_rpc_error


class LostError(Exception):
    """The stream ended without an answer.

    Attributes:
        error: why.
        retryable: whether the request may be sent again on another stream.
    """

    _RETRYABLE = ("UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN")

    def __init__(self, error: PolicyError) -> None:
        super().__init__(error.message)
        self.error = error
        self.retryable = error.code in self._RETRYABLE


class Stream:
    """Request bytes in, answer bytes out. A stream on which `exchange` has failed is over."""

    def __init__(self, method: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        """Opens the stream.

        Args:
            method: gRPC's stream-stream callable on bytes.
            metadata: sent along, once.
        """
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # Waits for the connection when there is none yet; the deadline ends the wait.
        self._call: Any = method(iter(self._requests.get, None), metadata=metadata, wait_for_ready=True)
        self._call.add_done_callback(lambda _: self._requests.put(None))  # ends gRPC's thread that waits for requests

    @property
    def over(self) -> bool:
        """Whether the server or the connection has ended the stream."""
        return self._call.done()

    def exchange(self, data: bytes, deadline: float, deadlines: "Deadlines") -> bytes:
        """Sends a request and waits for its answer.

        Args:
            data: serialized InferStreamRequest.
            deadline: on the clock of `time.monotonic`, in seconds.
            deadlines: cancels the stream when it has passed.

        Raises:
            PolicyTimeoutError: no answer before the deadline.
            LostError: the stream has ended.
        """
        watched = deadlines.add(deadline, self._call.cancel)
        try:
            self._requests.put(data)
            return next(self._call)
        except StopIteration:
            raise LostError(UnavailableError("the server ended the stream")) from None
        except grpc.RpcError as error:
            if not deadlines.remove(watched):
                raise PolicyTimeoutError("no answer before the request's time ran out") from None
            raise LostError(from_rpc_error(error)) from error
        except BaseException:  # an interrupt from the keyboard: the answer to come is nobody's
            self._call.cancel()
            raise
        finally:
            deadlines.remove(watched)

    def close(self) -> None:
        """Ends the stream, and with it the request on it."""
        self._call.cancel()


class Deadlines:
    """Calls back when a deadline passes: one thread for any number of requests, asleep while none is near."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._callbacks: dict[int, tuple[float, Callable[[], object]]] = {}
        self._last_key = 0
        self._wakes_at = float("inf")
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, deadline: float, callback: Callable[[], object]) -> int:
        """Has `callback` called at `deadline`, a moment of `time.monotonic`; returns a key for `remove`."""
        with self._condition:
            self._last_key += 1
            self._callbacks[self._last_key] = (deadline, callback)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="openpi-flash-deadlines", daemon=True)
                self._thread.start()
            elif deadline < self._wakes_at:
                self._condition.notify()
            return self._last_key

    def remove(self, key: int) -> bool:
        """Forgets a deadline; false: it has passed, or was removed before."""
        with self._condition:
            return self._callbacks.pop(key, None) is not None

    def close(self) -> None:
        """Ends the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                now = time.monotonic()
                due = [key for key, (deadline, _) in self._callbacks.items() if deadline <= now]
                callbacks = [self._callbacks.pop(key)[1] for key in due]
                if not due:
                    if self._closed:
                        return
                    self._wakes_at = min((deadline for deadline, _ in self._callbacks.values()), default=float("inf"))
                    self._condition.wait(self._wakes_at - now if self._callbacks else None)
                    continue
            for callback in callbacks:
                callback()
