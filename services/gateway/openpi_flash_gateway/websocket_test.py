"""openpi's WebSocket protocol: its own transcript, its error rules, and clients that misbehave."""

import asyncio
import json
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from openpi_flash_common import openpi_msgpack
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from openpi_flash_gateway import websocket
from openpi_flash_gateway.conftest import ACTIONS, FakeActionService, make_settings, running_gateway
from openpi_flash_gateway.gateway import Gateway

_GOLDEN = Path(__file__).parents[3] / "tests/data/golden/transforms/websocket_transcript.json"
TRANSCRIPT = {step["step"]: step for step in json.loads(_GOLDEN.read_text())}
METADATA = bytes.fromhex(TRANSCRIPT["server->client on connect (metadata)"]["binary_hex"])


@pytest.fixture
def dial(gateway: Gateway) -> Callable[..., Any]:
    def dial(**options: Any) -> Any:
        return connect(
            f"ws://127.0.0.1:{gateway.websocket_ports['action']}", compression=None, max_size=None, **options
        )

    return dial


async def ask(connection: ClientConnection, **observation: Any) -> Any:
    await connection.send(openpi_msgpack.packb({"state": np.zeros(3), **observation}))
    answer = await asyncio.wait_for(connection.recv(), 10)
    return answer if isinstance(answer, str) else openpi_msgpack.unpackb(answer)


async def test_openpis_transcript(dial, action_service):
    first, second = (step for step in json.loads(_GOLDEN.read_text()) if step["step"] == "client->server infer")
    async with dial() as connection:
        assert await connection.recv() == METADATA
        await connection.send(bytes.fromhex(first["binary_hex"]))
        reply = await connection.recv()
        assert _without_timings(reply) == _golden_reply(0)
        await connection.send(bytes.fromhex(second["binary_hex"]))
        assert _without_timings(await connection.recv()) == _golden_reply(1)
    assert [received.request.observation.prompt for received in action_service.received] == ["go", "go again"]


def _golden_reply(index: int) -> bytes:
    steps = [s for s in json.loads(_GOLDEN.read_text()) if s["step"].startswith("server->client reply")]
    return _without_timings(bytes.fromhex(steps[index]["binary_hex"]))


def _without_timings(reply: bytes) -> bytes:
    """The same bytes with every timing, a float64, set to zero."""
    tree = msgpack.unpackb(reply)
    for timing in (tree["policy_timing"], tree["server_timing"]):
        for name, value in timing.items():
            assert isinstance(value, float)
            assert value > 0
            timing[name] = 0.0
    return msgpack.packb(tree)


async def test_timings(dial):
    async with dial() as connection:
        await connection.recv()
        first, second = await ask(connection), await ask(connection)
        assert first["policy_timing"] == {"infer_ms": 12.5}
        assert list(first["server_timing"]) == ["infer_ms"]
        assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]


async def test_reserved_keys_and_any_path(gateway, action_service):
    async with connect(f"ws://127.0.0.1:{gateway.websocket_ports['action']}/any/path?x=1") as connection:
        await connection.recv()
        answer = await ask(connection, prompt="go", seed=4, session_id="s", images={"cam": np.zeros((2, 2, 3), "u1")})
        np.testing.assert_array_equal(answer["actions"], ACTIONS + 4)
    (received,) = action_service.received
    assert received.request.session_id == "s"
    assert set(received.request.observation.tensors) == {"state", "images/cam"}


async def test_trace_context_comes_from_the_handshake(dial, action_service):
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with dial(additional_headers={"Traceparent": traceparent}) as connection:
        await connection.recv()
        await ask(connection)
    assert action_service.received[0].traceparent == traceparent


@pytest.mark.parametrize(
    ("frame", "problem"),
    [
        (openpi_msgpack.packb({"prompt": "refuse"}), "INVALID_ARGUMENT: state: not a number"),
        (openpi_msgpack.packb({"mode": "subtask_only"}), "FAILED_PRECONDITION: mode: subtask_only needs a planner"),
        (openpi_msgpack.packb({"mode": "x"}), "INVALID_ARGUMENT: mode: 'x' is not one of"),
        (openpi_msgpack.packb({"mode": "x" * 100_000}), "INVALID_ARGUMENT: mode: 'x"),
        (openpi_msgpack.packb({"a": {"b": None}}), "INVALID_ARGUMENT: a/b: null"),
        (openpi_msgpack.packb({"state": np.zeros(3)})[:-4], "INVALID_ARGUMENT: msgpack: .*incomplete"),
        (b"\xc1", "INVALID_ARGUMENT: msgpack: "),
        (b"", "INVALID_ARGUMENT: msgpack: "),
        ("text", "INVALID_ARGUMENT: a text frame"),
    ],
)
async def test_a_faulty_request_gets_a_text_frame_and_1011(dial, frame, problem):
    async with dial() as faulty, dial() as other:
        await faulty.recv()
        await other.recv()
        await faulty.send(frame)
        answer = await faulty.recv()
        assert isinstance(answer, str)
        assert re.match(problem, answer)
        assert "\n" not in answer
        assert "Traceback" not in answer
        assert len(answer) <= 2048
        with pytest.raises(ConnectionClosed) as caught:
            await faulty.recv()
        assert caught.value.rcvd.code == TRANSCRIPT["then the server closes"]["code"]
        assert "actions" in await ask(other)


@pytest.mark.parametrize("gateway_settings", [{"default_timeout_ms": 100, "max_in_flight": 1}])
async def test_after_a_fault_that_passes_the_connection_stays(dial, action_service):
    async with dial() as slow, dial() as other:
        await slow.recv()
        await other.recv()
        asked = asyncio.ensure_future(ask(slow, prompt="slow"))
        await action_service.wait_received(1)
        assert (await ask(other)).startswith("RESOURCE_EXHAUSTED: ")
        assert (await asked).startswith("DEADLINE_EXCEEDED: ")
        assert "actions" in await ask(slow)
        assert "actions" in await ask(other)
        assert (await ask(other, prompt="die")).startswith("UNAVAILABLE: ")
        assert "actions" in await ask(other)


async def test_a_client_that_leaves_takes_its_request_along(gateway, dial, action_service):
    connection = await dial()
    await connection.recv()
    await connection.send(openpi_msgpack.packb({"prompt": "slow"}))
    await action_service.wait_received(1)
    connection.transport.abort()
    await asyncio.wait_for(action_service.cancelled.wait(), 10)
    async with dial() as other:
        await other.recv()
        assert "actions" in await ask(other)


async def test_a_client_that_reads_nothing_is_cut_off_and_delays_nobody(gateway, dial, monkeypatch):
    monkeypatch.setattr(websocket, "_SEND_TIMEOUT_S", 0.5)
    deaf = await asyncio.to_thread(_handshake, gateway.websocket_ports["action"])
    frame = _frame(openpi_msgpack.packb({"prompt": "big"}))

    async def flood() -> None:
        loop = asyncio.get_running_loop()
        while True:
            await loop.sock_sendall(deaf, frame * 200)

    deaf.setblocking(False)
    flooding = asyncio.ensure_future(flood())
    async with dial() as other:
        await other.recv()
        while not flooding.done():
            assert "actions" in await ask(other)
    with pytest.raises(OSError, match=r"reset|pipe"):
        await flooding
    deaf.close()


def _handshake(port: int) -> socket.socket:
    """A WebSocket whose receive buffer is small, so that unread replies soon fill it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    assert client.recv(4096).startswith(b"HTTP/1.1 101")
    return client


def _frame(payload: bytes) -> bytes:
    """A binary frame with a mask of zeros."""
    length = bytes([0x80 | len(payload)]) if len(payload) < 126 else struct.pack("!BH", 0x80 | 126, len(payload))
    return b"\x82" + length + bytes(4) + payload


@pytest.mark.parametrize("gateway_settings", [{"max_message_bytes": 1 << 16}])
async def test_an_oversized_message_is_refused_by_its_declared_length(gateway, dial):
    client = await asyncio.to_thread(_handshake, gateway.websocket_ports["action"])
    client.sendall(b"\x82" + struct.pack("!BQ", 0x80 | 127, 1 << 40) + bytes(4))  # a header, and none of the bytes
    client.settimeout(10)
    received = await asyncio.to_thread(lambda: b"".join(iter(lambda: client.recv(4096), b"")))
    assert struct.pack("!H", 1009) in received
    client.close()
    async with dial() as connection:
        await connection.recv()
        assert "actions" in await ask(connection)


async def test_healthz_and_plain_http(gateway, action_service):
    golden = TRANSCRIPT["GET /healthz"]
    status, body = await asyncio.to_thread(_get, gateway.websocket_ports["action"], "/healthz")
    assert (status, body) == (golden["status"], golden["body"])
    status, body = await asyncio.to_thread(_get, gateway.websocket_ports["action"], "/other")
    assert (status, body) == (426, TRANSCRIPT["GET /other without an upgrade"]["body"])
    await action_service.stop()
    while status != 503:
        await asyncio.sleep(0.02)
        status, body = await asyncio.to_thread(_get, gateway.websocket_ports["action"], "/healthz")
    assert "action service" in body


def _get(port: int, path: str) -> tuple[int, str]:
    import http.client

    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    client.request("GET", path)
    response = client.getresponse()
    return response.status, response.read().decode()


async def test_a_client_that_comes_early_gets_its_metadata_when_all_is_warm(tmp_path, unused_tcp_port):
    async with running_gateway(make_settings(tmp_path, unused_tcp_port)) as gateway:
        async with connect(f"ws://127.0.0.1:{gateway.websocket_ports['action']}") as connection:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(connection.recv(), 0.2)
            service = FakeActionService()
            service.port = unused_tcp_port
            await service.start()
            assert await asyncio.wait_for(connection.recv(), 20) == METADATA
            assert "actions" in await ask(connection)
        await service.stop()


@pytest.mark.parametrize("gateway_settings", [{"auth": {"tokens": ["sesame"]}}])
@pytest.mark.parametrize(
    ("headers", "admitted"),
    [
        ({"Authorization": "Api-Key sesame"}, True),
        ({"Authorization": "Bearer sesame"}, True),
        ({"Authorization": "Bearer wrong"}, False),
        ({"Authorization": "sesame"}, False),
        ({"Authorization": "Basic sesame"}, False),
        ({}, False),
    ],
)
async def test_tokens(gateway, dial, headers, admitted):
    if admitted:
        async with dial(additional_headers=headers) as connection:
            assert await connection.recv() == METADATA
    else:
        with pytest.raises(InvalidStatus) as caught:
            await dial(additional_headers=headers)
        assert caught.value.response.status_code == 401
    assert (await asyncio.to_thread(_get, gateway.websocket_ports["action"], "/healthz"))[0] == 200


@pytest.mark.parametrize("gateway_settings", [{"max_in_flight": 1}])
async def test_connections_are_limited(dial):
    connections = [await dial() for _ in range(4)]
    with pytest.raises(InvalidStatus) as caught:
        await dial()
    assert caught.value.response.status_code == 503
    await connections.pop().close()
    while True:
        try:
            connections.append(await dial())
            break
        except InvalidStatus:
            await asyncio.sleep(0.02)
    for connection in connections:
        await connection.close()


async def test_a_stop_answers_what_runs_and_closes_idle_connections(action_service, tmp_path):
    async with running_gateway(make_settings(tmp_path, action_service.port)) as gateway:
        uri = f"ws://127.0.0.1:{gateway.websocket_ports['action']}"
        async with connect(uri) as idle, connect(uri) as busy:
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
