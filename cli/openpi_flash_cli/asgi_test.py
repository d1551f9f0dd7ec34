"""How the application ends when what it runs does."""

import asyncio
import os
from typing import Any

import pytest
from openpi_flash_common.settings import EngineSettings

from openpi_flash_cli import asgi

SETTINGS = EngineSettings.model_validate({"action": {"model_config_name": "pi05_droid", "checkpoint_dir": "nowhere"}})


class Running:
    """Stands for the gateway and for the supervisor: runs until told to stop, or until it fails."""

    def __init__(self) -> None:
        self.fails_with: Exception | None = None
        self.stopped = asyncio.Event()
        self.ended = False

    async def run(self) -> int:
        if self.fails_with is not None:
            raise self.fails_with
        await self.stopped.wait()
        self.ended = True
        return 0

    run_until_stopped = run

    def stop(self) -> None:
        self.stopped.set()

    async def start(self) -> None: ...

    def asgi(self) -> None: ...


@pytest.fixture
def running(monkeypatch) -> tuple[Running, Running]:
    gateway, supervisor = Running(), Running()
    monkeypatch.setattr(asgi, "Gateway", lambda *_, **__: gateway)
    monkeypatch.setattr(asgi, "Supervisor", lambda *_, **__: supervisor)
    monkeypatch.setattr(asgi, "setup_logging", lambda *_: None)
    return gateway, supervisor


async def live(monkeypatch) -> tuple[list[str], list[dict[str, Any]]]:
    """Lets a host run the lifespan that shuts down when its process gets SIGTERM; the signals, and what it was sent."""
    asked: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    asked.put_nowait({"type": "lifespan.startup"})
    signals, sent = [], []

    def kill(_: int, number: Any) -> None:
        signals.append(number.name)
        asked.put_nowait({"type": "lifespan.shutdown"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    monkeypatch.setattr(os, "kill", kill)
    async with asyncio.timeout(10):
        await asgi.application(SETTINGS)({"type": "lifespan"}, asked.get, send)
    return signals, sent


@pytest.mark.parametrize("which", [0, 1])
async def test_the_process_ends_when_the_gateway_or_the_supervisor_fails(monkeypatch, running, which):
    running[which].fails_with = RuntimeError("no more files")
    signals, sent = await live(monkeypatch)
    assert signals == ["SIGTERM"]
    assert running[1 - which].ended
    assert sent == [
        {"type": "lifespan.startup.complete"},
        {"type": "lifespan.shutdown.failed", "message": "no more files"},
    ]


async def test_the_process_ends_when_the_gateway_has_stopped(monkeypatch, running):
    gateway, supervisor = running
    gateway.stop()
    signals, sent = await live(monkeypatch)
    assert signals == ["SIGTERM"]
    assert supervisor.ended
    assert sent[-1] == {"type": "lifespan.shutdown.complete"}
