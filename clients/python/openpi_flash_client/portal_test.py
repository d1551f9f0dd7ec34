"""The portal on loopback: direct, relayed, and with strangers at the relay; a plain UDP echo stands for the edge."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from openpi_flash_client import portal
from openpi_flash_client.errors import UnavailableError
from openpi_flash_client.portal import Portal, Relay, serve


class Store(dict):
    """A Modal Dict's methods on a dict."""

    def put(self, key: Any, value: Any, *, skip_if_exists: bool = False) -> bool:
        if skip_if_exists and key in self:
            return False
        self[key] = value
        return True


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    stop = threading.Event()
    yield stop
    stop.set()


@pytest.fixture
def echo(stop: threading.Event) -> tuple[str, int]:
    """A UDP server that answers what it gets, in capitals."""
    bound = portal._udp_socket("127.0.0.1")
    bound.settimeout(0.1)

    def run() -> None:
        while not stop.is_set():
            try:
                data, sender = bound.recvfrom(1 << 16)
            except TimeoutError:
                continue
            bound.sendto(data.upper(), sender)

    threading.Thread(target=run, daemon=True).start()
    return bound.getsockname()


def start(target: Any, *arguments: Any, **options: Any) -> None:
    threading.Thread(target=target, args=arguments, kwargs=options, daemon=True).start()


@pytest.fixture
def relay(stop: threading.Event) -> tuple[str, int]:
    relay = Relay(("127.0.0.1", 0), "sesame")
    start(relay.run, stop)
    return "127.0.0.1", relay.port


def published(store: Store, echo: tuple[str, int], stop: threading.Event, **options: Any) -> Store:
    start(serve, store, echo, "f" * 64, stop, stun_servers=(), **options)
    deadline = time.monotonic() + 10
    while portal.SERVER_KEY not in store:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return store


def ask(port: int, data: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
        user.settimeout(10)
        user.sendto(data, ("127.0.0.1", port))
        return user.recv(1 << 16)


def test_direct(echo, stop):
    store = published(Store(), echo, stop)
    with Portal(store, stun_servers=()) as robot, Portal(store, stun_servers=()) as other:
        assert robot.path == "direct"
        assert robot.fingerprint == "f" * 64
        assert ask(robot.port, b"one") == b"ONE"
        assert ask(other.port, b"two") == b"TWO"
        assert ask(robot.port, bytes(range(256)) * 5) == (bytes(range(256)) * 5).upper()
    assert set(store) == {portal.SERVER_KEY}, "joins do not stay in the store"


def test_by_the_relay_alone(echo, stop, relay):
    store = published(Store(), echo, stop, relay=relay, relay_only=True, relay_key="sesame")
    with Portal(store, stun_servers=()) as robot:
        assert robot.path == "relay"
        assert ask(robot.port, b"one") == b"ONE"


def test_falls_back_to_the_relay(echo, stop, relay, monkeypatch):
    monkeypatch.setattr(portal, "_candidates", lambda *_: [("127.0.0.1", 9)])  # where nobody is
    store = published(Store(), echo, stop, relay=relay, relay_key="sesame")
    with Portal(store, stun_servers=()) as robot:
        assert robot.path == "relay"
        assert ask(robot.port, b"one") == b"ONE"


def test_a_relay_does_nothing_for_those_without_its_key(echo, stop, relay):
    store = published(Store(), echo, stop, relay=relay, relay_only=True, relay_key="sesame")
    store[portal.SERVER_KEY]["relay_key"] = "wrong"
    with pytest.raises(UnavailableError, match="no datagram gets through"):
        Portal(store, stun_servers=(), connect_timeout_s=2)


def test_a_relay_enters_no_address_that_has_not_answered_it(relay):
    hello = portal._build(portal._HELLO, 0, bytes(16), b"sesame")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
        user.settimeout(5)
        user.sendto(hello, relay)
        challenge = user.recv(100)
        assert len(challenge) <= len(hello)
        assert portal._parse(challenge, b"sesame").kind == portal._CHALLENGE
        assert portal._parse(challenge, b"wrong") is None
        assert portal._parse(challenge[:-1] + b"x", b"sesame") is None


def test_no_server():
    with pytest.raises(UnavailableError, match="is the app running"):
        Portal(Store(), stun_servers=())


def test_joins_again_when_the_server_has_been_away(echo, monkeypatch):
    monkeypatch.setattr(portal, "_SILENT_S", 1.5)
    monkeypatch.setattr(portal, "_KEEPALIVE_S", 0.3)
    first, second, store = threading.Event(), threading.Event(), Store()
    published(store, echo, first)
    with Portal(store, stun_servers=()) as robot:
        assert ask(robot.port, b"one") == b"ONE"
        first.set()
        while portal.SERVER_KEY in store:
            time.sleep(0.01)
        published(store, echo, second)
        answer, deadline = b"", time.monotonic() + 30
        while answer != b"TWO" and time.monotonic() < deadline:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
                user.settimeout(0.3)
                user.sendto(b"two", ("127.0.0.1", robot.port))
                try:
                    answer = user.recv(100)
                except TimeoutError:
                    continue
        assert answer == b"TWO"
    second.set()


def test_strangers_packets_go_nowhere(echo, stop):
    store = published(Store(), echo, stop)
    with Portal(store, stun_servers=()) as robot, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.settimeout(0.5)
        stranger.sendto(b"hello", ("127.0.0.1", robot._leg.socket.getsockname()[1]))
        stranger.sendto(portal._build(portal._PUNCH, 1, robot._leg.id, b"guess"), robot._leg.socket.getsockname())
        with pytest.raises(TimeoutError):
            stranger.recv(100)
        assert ask(robot.port, b"one") == b"ONE"


def test_stun():
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))

    def answer() -> None:
        data, sender = server.recvfrom(100)
        assert data[:8] == struct.pack("!HHI", 1, 0, 0x2112A442)
        host = struct.unpack("!I", socket.inet_aton(sender[0]))[0] ^ 0x2112A442
        software = struct.pack("!HH", 0x8022, 5) + b"hello\0\0\0"  # an attribute of odd length before it
        mapped = struct.pack("!HHBBHI", 0x0020, 8, 0, 1, sender[1] ^ 0x2112, host)
        body = software + mapped
        server.sendto(struct.pack("!HHI", 0x0101, len(body), 0x2112A442) + data[8:20] + body, sender)

    start(answer)
    with portal._udp_socket("127.0.0.1") as bound:
        assert portal._ask_stun(bound, server.getsockname()) == bound.getsockname()
    server.close()
