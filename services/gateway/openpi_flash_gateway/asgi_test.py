"""What the ASGI application does with a host that tells it little."""

import asyncio
from typing import Any

from openpi_flash_common import openpi_msgpack

from openpi_flash_gateway import conversation


class Robot:
    """A robot behind a host that never says whether it is still there.

    Attributes:
        frames: what it is to send.
        sent: types of the messages to it.
        deaf: it reads nothing: no frame to it is ever sent.
    """

    def __init__(self, *, deaf: bool = False) -> None:
        self.frames: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.frames.put_nowait({"type": "websocket.connect"})
        self.sent: list[str] = []
        self.deaf = deaf
        self._change = asyncio.Condition()

    async def receive(self) -> dict[str, Any]:
        return await self.frames.get()

    async def send(self, message: Any) -> None:
        async with self._change:
            self.sent.append(message["type"])
            self._change.notify_all()
        if self.deaf and message["type"] == "websocket.send":
            await asyncio.Event().wait()

    async def wait_sent(self, kind: str) -> None:
        async with self._change:
            await asyncio.wait_for(self._change.wait_for(lambda: kind in self.sent), 10)


SCOPE = {"type": "websocket", "path": "/", "headers": []}


async def test_a_client_that_reads_nothing_is_cut_off(gateway, monkeypatch):
    monkeypatch.setattr(conversation, "SEND_TIMEOUT_S", 0.05)
    robot = Robot(deaf=True)
    await asyncio.wait_for(gateway.asgi()(SCOPE, robot.receive, robot.send), 10)
    assert robot.sent == ["websocket.accept", "websocket.send", "websocket.close"]


async def test_a_drain_ends_with_the_last_conversation(gateway, action_service):
    application = gateway.asgi()
    idle, busy = Robot(), Robot()
    serving = [asyncio.ensure_future(application(SCOPE, robot.receive, robot.send)) for robot in (idle, busy)]
    for robot in (idle, busy):
        await robot.wait_sent("websocket.send")
    busy.frames.put_nowait({"type": "websocket.receive", "bytes": openpi_msgpack.packb({"prompt": "slow"})})
    await action_service.wait_received(1)
    draining = asyncio.ensure_future(application.drain())
    await idle.wait_sent("websocket.close")

    late = Robot()
    await application({**SCOPE, "extensions": {"websocket.http.response": {}}}, late.receive, late.send)
    assert late.sent == ["websocket.http.response.start", "websocket.http.response.body"]

    action_service.release.set()
    await asyncio.wait_for(draining, 10)
    assert busy.sent == ["websocket.accept", "websocket.send", "websocket.send", "websocket.close"]
    await asyncio.wait_for(asyncio.gather(*serving), 10)
    await application.drain()
