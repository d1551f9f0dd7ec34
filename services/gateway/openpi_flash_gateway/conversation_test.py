"""openpi's WebSocket protocol, by the gateway's own port and by the ASGI application under uvicorn: its transcript, its
error rules, and clients that misbehave."""

import asyncio
import contextlib
import http.client
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import uvicorn
from openpi_flash_common import openpi_msgpack
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from openpi_flash_gateway.conftest import ACTIONS, FakeActionService, ask, make_settings, running_gateway
from openpi_flash_gateway.gateway import Gateway

_GOLDEN = Path(__file__).parents[3] / "tests/data/golden/transforms/websocket_transcript.json"
TRANSCRIPT = {step["step"]: step for step in json.loads(_GOLDEN.read_text())}
METADATA = bytes.fromhex(TRANSCRIPT["server->client on connect (metadata)"]["binary_hex"])
LISTENERS = ("websocket", "asgi")


class Host(uvicorn.Server):
    """uvicorn beside a gateway, in its event loop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.asynccontextmanager
async def listening(listener: str, gateway: Gateway) -> AsyncIterator[int]:
    """The port on which the policy is served."""
    if listener == "websocket":
        yield gateway.websocket_ports["action"]
        return
    bound = socket.create_server(("127.0.0.1", 0))
    host = Host(uvicorn.Config(gateway.asgi(), lifespan="off", log_config=None, timeout_graceful_shutdown=5))
    serving = asyncio.ensure_future(host.serve([bound]))
    yield bound.getsockname()[1]
    host.should_exit = True
    await serving


@pytest.fixture(params=LISTENERS)
def listener(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def port(listener: str, gateway: Gateway) -> AsyncIterator[int]:
    async with listening(listener, gateway) as port:
        yield port


@pytest.fixture
def dial(port: int) -> Callable[..., Any]:
    def dial(path: str = "/", **options: Any) -> Any:
        return connect(f"ws://127.0.0.1:{port}{path}", compression=None, max_size=None, **options)

    return dial


async def get(port: int, path: str) -> tuple[int, str]:
    def request() -> tuple[int, str]:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        client.request("GET", path)
        response = client.getresponse()
        return response.status, response.read().decode()

    return await asyncio.to_thread(request)


async def test_openpis_transcript(dial, action_service):
    steps = json.loads(_GOLDEN.read_text())
    requests = [step["binary_hex"] for step in steps if step["step"] == "client->server infer"]
    replies = [step["binary_hex"] for step in steps if step["step"].startswith("server->client reply")]
    async with dial() as connection:
        assert await connection.recv() == METADATA
        for request, reply in zip(requests, replies, strict=True):
            await connection.send(bytes.fromhex(request))
            assert _without_timings(await connection.recv()) == _without_timings(bytes.fromhex(reply))
    assert action_service.prompts == ["go", "go again"]


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


async def test_reserved_keys_and_any_path(dial, action_service):
    async with dial("/any/path?x=1") as connection:
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


async def test_healthz_and_plain_http(listener, port, action_service):
    golden = TRANSCRIPT["GET /healthz"]
    assert await get(port, "/healthz") == (golden["status"], golden["body"])
    status, body = await get(port, "/other")
    own = "robots connect here by WebSocket\n"
    assert (status, body) == (426, own if listener == "asgi" else TRANSCRIPT["GET /other without an upgrade"]["body"])
    await action_service.stop()
    while status != 503:
        await asyncio.sleep(0.02)
        status, body = await get(port, "/healthz")
    assert "action service" in body


async def test_a_client_that_comes_early_gets_its_metadata_when_all_is_warm(listener, tmp_path, unused_tcp_port):
    async with (
        running_gateway(make_settings(tmp_path, unused_tcp_port)) as gateway,
        listening(listener, gateway) as port,
        connect(f"ws://127.0.0.1:{port}") as connection,
    ):
        metadata = asyncio.ensure_future(connection.recv())
        await (await connection.ping())
        assert not metadata.done()
        service = FakeActionService()
        service.port = unused_tcp_port
        await service.start()
        assert await asyncio.wait_for(metadata, 20) == METADATA
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
async def test_tokens(port, dial, headers, admitted):
    if admitted:
        async with dial(additional_headers=headers) as connection:
            assert await connection.recv() == METADATA
    else:
        with pytest.raises(InvalidStatus) as caught:
            await dial(additional_headers=headers)
        assert caught.value.response.status_code == 401
    assert (await get(port, "/healthz"))[0] == 200


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
