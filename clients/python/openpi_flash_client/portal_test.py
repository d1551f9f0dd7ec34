"""The portal on loopback: direct, relayed, and with strangers at the relay; a plain UDP echo stands for the edge."""

import collections
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from openpi_flash_client import portal
from openpi_flash_client.errors import UnavailableError
from openpi_flash_client.portal import Portal, Relay, serve


class Store(dict):
    """A Modal Dict's methods on a dict. `fault` may raise before any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Callable[[str], None] = lambda method: None
        self._changed = threading.Condition()

    def get(self, key: str, default: Any = None) -> Any:
        self.fault("get")
        return super().get(key, default)

    def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        self.fault("put")
        with self._changed:
            if skip_if_exists and key in self:
                return False
            self[key] = value
            self._changed.notify_all()
        return True

    def pop(self, key: str, default: Any) -> Any:
        self.fault("pop")
        with self._changed:
            value = super().pop(key, default)
            self._changed.notify_all()
        return value

    def keys(self) -> Iterator[str]:
        self.fault("keys")
        yield from list(self)
        self.fault("keys, at the end")

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 60) -> None:
        """Waits until what is stored fulfils a condition."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "not stored in time"


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
    store.wait_for(lambda: portal.SERVER_KEY in store)
    return store


def udp_user() -> socket.socket:
    user = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    user.settimeout(10)
    return user


def ask(port: int, data: bytes) -> bytes:
    with udp_user() as user:
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
    with udp_user() as one, udp_user() as other:

        def greet(user: socket.socket, role: int, cookie: bytes) -> None:
            user.sendto(portal._build(portal._HELLO, role, bytes(16), b"sesame", cookie), relay)

        def cookie(user: socket.socket, role: int) -> bytes:
            challenge = user.recv(100)
            assert len(challenge) <= len(portal._build(portal._HELLO, role, bytes(16), b"sesame"))
            assert portal._parse(challenge, b"wrong") is None
            assert portal._parse(challenge[:-1] + b"x", b"sesame") is None
            parsed = portal._parse(challenge, b"sesame")
            assert (parsed.kind, parsed.role) == (portal._CHALLENGE, role)
            return parsed.cookie

        greet(one, 0, bytes(16))
        greet(one, 0, of_one := cookie(one, 0))
        for guess in (bytes(16), of_one):
            greet(other, 1, guess)
            of_other = cookie(other, 1)
            one.sendto(b"to nobody yet", relay)
        greet(other, 1, of_other)
        one.sendto(b"to the other", relay)
        assert other.recv(100) == b"to the other"


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
        store.wait_for(lambda: portal.SERVER_KEY not in store)
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
    with Portal(store, stun_servers=()) as robot, udp_user() as user, udp_user() as stranger:
        leg = robot._leg.socket.getsockname()
        user.sendto(b"one", ("127.0.0.1", robot.port))
        assert user.recv(100) == b"ONE"
        stranger.sendto(b"hello", leg)
        stranger.sendto(portal._build(portal._PUNCH, 1, robot._leg.id, b"guess"), leg)
        user.sendto(b"two", ("127.0.0.1", robot.port))
        assert user.recv(100) == b"TWO", "what came first was the stranger's"
        stranger.settimeout(0)
        with pytest.raises(BlockingIOError):  # the portal has read the stranger's, and answers at once if at all
            stranger.recv(100)
        stranger.settimeout(10)
        stranger.sendto(portal._build(portal._PUNCH, 1, robot._leg.id, robot._leg.key), leg)
        assert portal._parse(stranger.recv(100), robot._leg.key).kind == portal._PUNCHED


class Hiccups:
    """Every other call of a store's method fails, the first one among them."""

    def __init__(self) -> None:
        self.num_calls: collections.Counter[str] = collections.Counter()

    def __call__(self, method: str) -> None:
        self.num_calls[method] += 1
        if self.num_calls[method] % 2:
            raise ConnectionError(f"{method} failed")


def test_a_store_with_hiccups(echo, stop):
    store = Store()
    store.fault = hiccups = Hiccups()
    published(store, echo, stop)
    with Portal(store, stun_servers=()) as robot:
        assert ask(robot.port, b"one") == b"ONE"
    assert set(hiccups.num_calls) == {"get", "put", "pop", "keys", "keys, at the end"}


def failing(method: str) -> None:
    raise ConnectionError("the store is away")


def test_a_store_that_goes_on_failing_is_named():
    store = Store()
    store.fault = failing
    with pytest.raises(UnavailableError, match=r"store that robot and server share fails: ConnectionError\('the store"):
        Portal(store, stun_servers=(), connect_timeout_s=0.2)


def test_a_join_that_is_none_hinders_nobody(echo, stop):
    store = Store()
    for name, join in (("no number", {}), ("00" * 16, {"key": 7}), ("11" * 16, None), ("22" * 16, {"key": "00"})):
        store.put(portal.JOIN + name, join)
    published(store, echo, stop)
    with Portal(store, stun_servers=()) as robot:
        assert ask(robot.port, b"one") == b"ONE"


@pytest.fixture
def lost_names(monkeypatch) -> None:
    def gethostbyname(name: str) -> str:
        raise socket.gaierror(f"no such name: {name}")

    monkeypatch.setattr(socket, "gethostbyname", gethostbyname)


def test_a_relay_whose_name_is_lost_leaves_the_direct_path(echo, stop, lost_names):
    store = published(Store(), echo, stop, relay=("relay.test", 1), relay_key="sesame")
    with Portal(store, stun_servers=()) as robot:
        assert robot.path == "direct"


def test_a_relay_whose_name_is_lost_is_named_where_there_is_no_other_path(echo, stop, lost_names):
    store = published(Store(), echo, stop, relay=("relay.test", 1), relay_only=True, relay_key="sesame")
    with pytest.raises(UnavailableError, match=r"the relay relay\.test is not found: no such name"):
        Portal(store, stun_servers=())


@pytest.fixture
def left_alone(echo) -> Iterator[tuple[Portal, Store]]:
    """A robot that has lost its path, and has asked for another from a server that is no longer there."""
    first = threading.Event()
    store = published(Store(), echo, first)
    with Portal(store, stun_servers=()) as robot:
        first.set()
        store.wait_for(lambda: portal.SERVER_KEY not in store)
        store.put(portal.SERVER_KEY, {"fingerprint": "f" * 64, "relay": None, "relay_only": False, "relay_key": ""})
        robot._leg.last_heard = float("-inf")
        store.wait_for(lambda: any(key.startswith(portal.JOIN) for key in list(store)))
        yield robot, store


def test_closing_ends_the_search_for_a_path(left_alone):
    robot, store = left_alone
    (join,) = [key for key in list(store) if key.startswith(portal.JOIN)]
    store.put(portal.ANSWER + join.removeprefix(portal.JOIN), {"addresses": [["127.0.0.1", 9]]})
    robot.close()
    assert not robot._thread.is_alive()
    store.wait_for(lambda: set(store) == {portal.SERVER_KEY})


def test_closing_waits_for_no_store_that_does_not_answer(left_alone, monkeypatch):
    robot, store = left_alone
    monkeypatch.setattr(portal, "_CLOSE_TIMEOUT_S", 0.01)
    asked, answers = threading.Event(), threading.Event()

    def fault(method: str) -> None:
        asked.set()
        assert answers.wait(60)

    store.fault = fault
    assert asked.wait(60)
    robot.close()
    assert robot._thread.is_alive()
    answers.set()
    robot._thread.join(60)
    assert not robot._thread.is_alive()


def test_a_server_that_is_interrupted_leaves_nothing_behind(echo, stop):
    store = Store()

    def fault(method: str) -> None:
        if method == "keys" and len(served) > 1:
            raise KeyboardInterrupt
        if method == "keys, at the end":
            served.append(set(threading.enumerate()) - before)

    before, served = set(threading.enumerate()), []
    store.fault = fault
    leg = {"key": "00" * 32, "addresses": []}
    store.put(portal.JOIN + "00" * 16, leg)
    with pytest.raises(KeyboardInterrupt):
        serve(store, echo, "f" * 64, stop, stun_servers=())
    assert stop.is_set()
    assert portal.SERVER_KEY not in store
    assert served[1], "the robot had a thread"
    assert not any(thread.is_alive() for thread in served[1])


@pytest.fixture
def stun() -> Iterator[socket.socket]:
    """A STUN server, for one request."""
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
    yield server
    server.close()


def test_stun(stun):
    with portal._udp_socket("127.0.0.1") as bound:
        assert portal._ask_stun(bound, stun.getsockname()) == bound.getsockname()


def test_the_usual_stun_servers_are_those_of_the_module_when_they_are_asked(stun, echo, stop, monkeypatch):
    monkeypatch.setattr(portal, "STUN_SERVERS", (stun.getsockname(),))
    addresses, store = [], published(Store(), echo, stop)
    find = portal._candidates

    def candidates(bound: socket.socket, servers: Any) -> list[portal.Address]:
        addresses.append(find(bound, servers))
        return addresses[-1]

    monkeypatch.setattr(portal, "_candidates", candidates)
    with Portal(store):
        assert "127.0.0.1" in [host for found in addresses for host, _ in found], "as the STUN server sees it"


@pytest.mark.parametrize(
    ("argument", "key", "message"),
    [("0.0.0.0:3479", "", "QUIC_RELAY_KEY is not set"), ("3479", "sesame", "'3479': HOST:PORT is expected")],
)
def test_a_relay_says_what_it_needs(argument, key, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["portal", argument])
    monkeypatch.setenv("QUIC_RELAY_KEY", key)
    with pytest.raises(SystemExit) as ended:
        portal.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
