"""What the WebSocket port does below the conversation: bytes that no client library would send, or would not read."""

import asyncio
import socket
import struct

import pytest
from openpi_flash_common import openpi_msgpack
from websockets.asyncio.client import connect

from openpi_flash_gateway import conversation
from openpi_flash_gateway.conftest import ask


async def test_a_client_that_reads_nothing_is_cut_off_and_delays_nobody(gateway, monkeypatch):
    monkeypatch.setattr(conversation, "SEND_TIMEOUT_S", 0.5)
    port = gateway.websocket_ports["action"]
    deaf = await asyncio.to_thread(_handshake, port)
    frame = _frame(openpi_msgpack.packb({"prompt": "big"}))

    async def flood() -> None:
        loop = asyncio.get_running_loop()
        while True:
            await loop.sock_sendall(deaf, frame * 200)

    deaf.setblocking(False)
    flooding = asyncio.ensure_future(flood())
    async with connect(f"ws://127.0.0.1:{port}") as other:
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
async def test_an_oversized_message_is_refused_by_its_declared_length(gateway):
    port = gateway.websocket_ports["action"]
    client = await asyncio.to_thread(_handshake, port)
    client.sendall(b"\x82" + struct.pack("!BQ", 0x80 | 127, 1 << 40) + bytes(4))  # a header, and none of the bytes
    client.settimeout(10)
    received = await asyncio.to_thread(lambda: b"".join(iter(lambda: client.recv(4096), b"")))
    assert struct.pack("!H", 1009) in received
    client.close()
    async with connect(f"ws://127.0.0.1:{port}") as connection:
        await connection.recv()
        assert "actions" in await ask(connection)
