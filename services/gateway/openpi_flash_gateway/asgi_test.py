"""The ASGI application under uvicorn: what holds for the gateway's own WebSocket port holds here."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from openpi_flash_common import openpi_msgpack
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from openpi_flash_gateway import asgi
from openpi_flash_gateway.gateway import Gateway
from openpi_flash_gateway.websocket_test import METADATA, TRANSCRIPT, _get, _golden_reply, _without_timings, ask


class Host(uvicorn.Server):
    """uvicorn on a free port of this loop."""

    port: int

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@pytest.fixture
async def host(gateway: Gateway) -> AsyncIterator[Host]:
    listener = socket.create_server(("127.0.0.1", 0))
    host = Host(uvicorn.Config(gateway.asgi(), lifespan="off", log_config=None, timeout_graceful_shutdown=5))
    host.port = listener.getsockname()[1]
    serving = asyncio.ensure_future(host.serve([listener]))
    yield host
    host.should_exit = True
    await serving


@pytest.fixture
def dial(host: Host) -> Callable[..., Any]:
    def dial(path: str = "/", **options: Any) -> Any:
        return connect(f"ws://127.0.0.1:{host.port}{path}", compression=None, max_size=None, **options)

    return dial


async def test_openpis_transcript(dial, action_service):
    path = Path(__file__).parents[3] / "tests/data/golden/transforms/websocket_transcript.json"
    requests = [step for step in json.loads(path.read_text()) if step["step"] == "client->server infer"]
    async with dial("/any/path?x=1") as connection:
        assert await connection.recv() == METADATA
        for index, step in enumerate(requests):
            await connection.send(bytes.fromhex(step["binary_hex"]))
            assert _without_timings(await connection.recv()) == _golden_reply(index)
    assert action_service.prompts == ["go", "go again"]


async def test_a_faulty_request_gets_a_text_frame_and_1011(dial):
    async with dial() as faulty, dial() as other:
        await faulty.recv()
        await other.recv()
        assert await ask(faulty, prompt="refuse") == "INVALID_ARGUMENT: state: not a number"
        with pytest.raises(ConnectionClosed) as caught:
            await faulty.recv()
        assert caught.value.rcvd.code == TRANSCRIPT["then the server closes"]["code"]
        await other.send("text")
        assert (await other.recv()).startswith("INVALID_ARGUMENT: a text frame")


async def test_after_a_fault_that_passes_the_connection_stays(dial):
    async with dial() as connection:
        await connection.recv()
        assert (await ask(connection, prompt="die")).startswith("UNAVAILABLE: ")
        assert "actions" in await ask(connection)


async def test_a_client_that_leaves_takes_its_request_along(dial, action_service):
    connection = await dial()
    await connection.recv()
    await connection.send(openpi_msgpack.packb({"prompt": "slow"}))
    await action_service.wait_received(1)
    connection.transport.abort()
    await asyncio.wait_for(action_service.cancelled.wait(), 10)
    async with dial() as other:
        await other.recv()
        assert "actions" in await ask(other)


@pytest.mark.parametrize("gateway_settings", [{"max_message_bytes": 1 << 16}])
async def test_an_oversized_message_is_refused(dial, action_service):
    async with dial() as connection:
        await connection.recv()
        await connection.send(bytes(1 + (1 << 16)))
        with pytest.raises(ConnectionClosed) as caught:
            await connection.recv()
        assert caught.value.rcvd.code == 1009
    assert not action_service.received


async def test_a_client_that_reads_nothing_is_cut_off(gateway, monkeypatch):
    monkeypatch.setattr(asgi, "_SEND_TIMEOUT_S", 0.05)
    sent = []

    async def receive() -> dict[str, Any]:
        if sent:
            await asyncio.Event().wait()
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] == "websocket.send":
            await asyncio.Event().wait()  # as with a peer whose receive window is full

    scope = {"type": "websocket", "path": "/", "headers": []}
    await asyncio.wait_for(gateway.asgi()(scope, receive, send), 10)
    assert sent == ["websocket.accept", "websocket.send", "websocket.close"]


async def test_healthz_and_plain_http(host, action_service):
    golden = TRANSCRIPT["GET /healthz"]
    assert await asyncio.to_thread(_get, host.port, "/healthz") == (golden["status"], golden["body"])
    status, body = await asyncio.to_thread(_get, host.port, "/other")
    assert (status, body) == (426, "robots connect here by WebSocket\n")
    await action_service.stop()
    while status != 503:
        await asyncio.sleep(0.02)
        status, body = await asyncio.to_thread(_get, host.port, "/healthz")
    assert "action service" in body


@pytest.mark.parametrize("gateway_settings", [{"auth": {"tokens": ["sesame"]}}])
async def test_tokens(dial, host):
    async with dial(additional_headers={"Authorization": "Api-Key sesame"}) as connection:
        assert await connection.recv() == METADATA
    for headers in ({"Authorization": "Api-Key wrong"}, {}):
        with pytest.raises(InvalidStatus) as caught:
            await dial(additional_headers=headers)
        assert caught.value.response.status_code == 401
    assert (await asyncio.to_thread(_get, host.port, "/healthz"))[0] == 200
    assert (await asyncio.to_thread(_get, host.port, "/other"))[0] == 401


async def test_a_stop_answers_what_runs_and_closes_idle_connections(gateway, dial, action_service):
    async with dial() as idle, dial() as busy:
        await idle.recv()
        await busy.recv()
        asked = asyncio.ensure_future(ask(busy, prompt="slow"))
        await action_service.wait_received(1)
        gateway.stop()
        with pytest.raises(ConnectionClosed) as caught:
            await asyncio.wait_for(idle.recv(), 10)
        assert caught.value.rcvd.code == 1001
        action_service.release.set()
        assert "actions" in await asked
