"""One piece of code for threads and for event loops: written with `await`, it waits in whatever way its callers do."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


def at_once(function: Callable[P, T]) -> Callable[P, Awaitable[T]]:
    """`function`, which may block, for code that awaits."""

    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    return call


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in this thread, without an event loop: all that it awaits must be `at_once`."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("a call that was begun in an event loop is waited for outside of it")
