"""UDP between a robot and a server that are both behind NAT. Experimental.

Both ends know a Store, such as a Modal Dict. A robot leaves its addresses there, the server answers with its own, and
both send to all of the other's addresses until something gets through (hole punching). Where nothing does, or where it
is asked for, both go through a relay. What travels is the QUIC of robot and server, packet by packet, unread: the
robot checks the server's certificate by the fingerprint in the store, so that a relay can delay and drop, no more.

    with Portal(store) as portal:
        policy = FlashTransportPolicy("127.0.0.1", portal.port, fingerprint=portal.fingerprint)

One portal is for one policy at a time. A relay is run on a machine that both can reach:

    QUIC_RELAY_KEY=… python -m openpi_flash_client.portal 0.0.0.0:3479
"""

import argparse
import contextlib
import dataclasses
import hashlib
import hmac
import logging
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

from openpi_flash_client.errors import UnavailableError

Address = tuple[str, int]

STUN_SERVERS: tuple[Address, ...] = (("stun.l.google.com", 19302), ("stun.cloudflare.com", 3478))
RELAY_PORT = 3479
SERVER_KEY = "quic"
JOIN, ANSWER = "quic-join/", "quic-answer/"

# Control datagrams begin like neither STUN's nor QUIC's (RFC 9443).
_MAGIC = b"\x02opf"
_PUNCH, _PUNCHED, _HELLO, _CHALLENGE = 1, 2, 3, 4
_ID_BYTES = _MAC_BYTES = _COOKIE_BYTES = 16
_CONTROL_BYTES = len(_MAGIC) + 2 + _ID_BYTES + _COOKIE_BYTES + _MAC_BYTES

_PUNCH_S, _KEEPALIVE_S = 0.1, 3.0  # a NAT forgets a UDP mapping after 30 s at the earliest
_SILENT_S = 12.0  # four keepalives without an answer
_DIRECT_FIRST_S = 2.0  # how long a relay waits for a direct path
_JOIN_TIMEOUT_S = 30.0
_POLL_S = 0.5
_CLOSE_TIMEOUT_S = 5.0
_MAX_PEERS = 64
_MAX_PAIRS = 1024
_MAX_DATAGRAM = 1 << 16
_BURST = 64

logger = logging.getLogger(__name__)


class Store(Protocol):
    """What both ends know: a Modal Dict, or anything with these of its methods. Any of them may raise, of any kind."""

    def get(self, key: str) -> Any:
        """The value; None: there is none."""

    def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        """Keeps a value, which JSON could hold, in place of the one before, for both ends to see.

        Returns:
            False: there is one, and it was to be skipped.
        """

    def pop(self, key: str, default: Any) -> Any:
        """Takes a value out; the default where there is none."""

    def keys(self) -> Iterable[str]:
        """Of all the values; may ask for more of them while they are gone through."""


class Portal:
    """A robot's end: a UDP port on loopback behind which the server is. Joins again by itself when the path dies.

    Attributes:
        port: for the policy, on 127.0.0.1.
        fingerprint: of the server's certificate.
    """

    def __init__(
        self,
        store: Store,
        *,
        stun_servers: Sequence[Address] | None = None,
        connect_timeout_s: float = 20.0,
    ) -> None:
        """Joins, and waits for a path.

        Args:
            store: what the server publishes itself in.
            stun_servers: asked for this robot's address outside; none: only its own addresses are tried. None:
                STUN_SERVERS.

        Raises:
            UnavailableError: no server in the store, no path to it within the timeout, or the store fails for as long.
        """
        self._closed = threading.Event()
        deadline = time.monotonic() + connect_timeout_s
        server = _insist(self._closed, deadline, store.get, SERVER_KEY)
        if server is None:
            raise UnavailableError("no QUIC server has published itself; is the app running?")
        self.fingerprint: str = server["fingerprint"]
        self._store = store
        self._stun_servers = STUN_SERVERS if stun_servers is None else stun_servers
        self._local = _udp_socket("127.0.0.1")
        self.port: int = self._local.getsockname()[1]
        try:
            self._leg = self._join(server, deadline)
        except BaseException:
            self._local.close()
            raise
        self._thread = threading.Thread(target=self._run, name="portal", daemon=True)
        self._thread.start()

    @property
    def path(self) -> str:
        """`direct`, `relay`, or `none` for now."""
        return self._leg.describe()

    def close(self) -> None:
        """Ends the portal. A store that does not answer is not waited for."""
        self._closed.set()
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._local.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                with contextlib.closing(self._leg.socket):
                    _pump(self._leg, self._local, None, self._closed)
            except Exception as error:
                logger.warning("the path to the server is lost: %r", error)
            self._join_again()

    def _join_again(self) -> None:
        while not self._closed.is_set():
            deadline = time.monotonic() + _JOIN_TIMEOUT_S
            try:
                self._leg = self._join(_insist(self._closed, deadline, self._store.get, SERVER_KEY), deadline)
            except Exception as error:  # whatever it is: tried again for as long as there is a user
                logger.warning("no path to the server: %s", error)
                self._closed.wait(_POLL_S)
            else:
                if self._closed.is_set():
                    self._leg.socket.close()
                return

    def _join(self, server: dict[str, Any] | None, deadline: float) -> "_Leg":
        if server is None:
            raise UnavailableError("the QUIC server is gone")
        relay = _find_relay(server["relay"], relay_only=server["relay_only"])
        leg = _Leg(0, secrets.token_bytes(_ID_BYTES), secrets.token_bytes(32), relay, server["relay_key"])
        join, answer = JOIN + leg.id.hex(), ANSWER + leg.id.hex()
        try:
            addresses = [] if server["relay_only"] else _candidates(leg.socket, self._stun_servers)
            value = {"key": leg.key.hex(), "addresses": addresses}
            _insist(self._closed, deadline, self._store.put, join, value)
            while (answered := _insist(self._closed, deadline, self._store.get, answer)) is None:
                if time.monotonic() > deadline or self._closed.wait(_POLL_S / 5):
                    raise UnavailableError("the QUIC server does not answer in the store")
            leg.candidates = [tuple(address) for address in answered["addresses"]]
            leg.wait_for_path(self._closed, deadline, 0 if server["relay_only"] else _DIRECT_FIRST_S)
        except BaseException:
            leg.socket.close()
            raise
        finally:
            _forget(self._store, join, answer)
        return leg


def serve(
    store: Store,
    upstream: Address,
    fingerprint: str,
    stop: threading.Event,
    *,
    relay: Address | None = None,
    relay_only: bool = False,
    relay_key: str = "",
    stun_servers: Sequence[Address] | None = None,
) -> None:
    """The server's end: publishes itself, and joins robots to the QUIC edge at `upstream`, until `stop`.

    A store that fails is asked again; robots that have been joined do not need it.

    Args:
        fingerprint: of the edge's certificate.
        stop: ends this; set, too, when something else has ended it.
        relay: where a relay runs; None: direct paths alone.
        relay_only: do not try direct paths.
        relay_key: shared by the relay and its users; robots read it in the store.
        stun_servers: as of Portal.
    """
    server = {
        "fingerprint": fingerprint,
        "relay": relay and list(relay),
        "relay_only": relay_only,
        "relay_key": relay_key,
    }
    stun_servers = STUN_SERVERS if stun_servers is None else stun_servers
    threads: list[threading.Thread] = []
    is_published = False
    try:
        while not stop.is_set():
            threads = [thread for thread in threads if thread.is_alive()]
            try:
                if not is_published:
                    store.put(SERVER_KEY, server)
                    is_published = True
                for key in [key for key in store.keys() if key.startswith(JOIN)]:  # noqa: SIM118 - a Dict is no dict
                    join = store.pop(key, None)
                    if join is None or len(threads) >= _MAX_PEERS:
                        continue
                    robot = (store, key.removeprefix(JOIN), join, server)
                    links = {"stun_servers": stun_servers, "upstream": upstream, "stop": stop}
                    thread = threading.Thread(target=_serve_robot, args=robot, kwargs=links, daemon=True)
                    thread.start()
                    threads.append(thread)
            except Exception as error:  # of the store's own kind
                logger.warning("the store fails, and is asked again: %r", error)
            stop.wait(_POLL_S)
    finally:
        stop.set()
        _forget(store, SERVER_KEY)
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


class Relay:
    """Forwards datagrams between the two ends of each session. Knows ends that hold its key, and reads nothing else."""

    def __init__(self, address: Address, key: str) -> None:
        self._socket = _udp_socket(*address)
        self._key, self._secret = key.encode(), secrets.token_bytes(32)
        self._sessions: dict[bytes, list[_RelayEnd | None]] = {}
        self._peers: dict[Address, Address] = {}
        self._swept = time.monotonic()
        self.port: int = self._socket.getsockname()[1]

    def run(self, stop: threading.Event) -> None:
        """Relays until `stop`."""
        self._socket.settimeout(_POLL_S)
        while not stop.is_set():
            with contextlib.suppress(OSError):  # nothing came, or an earlier datagram could not be delivered
                data, sender = self._socket.recvfrom(_MAX_DATAGRAM)
                hello = _parse(data, self._key)
                if hello is not None and hello.kind == _HELLO:
                    self._admit(hello, sender)
                elif (peer := self._peers.get(sender)) is not None:
                    self._socket.sendto(data, peer)
            self._sweep()
        self._socket.close()

    def _admit(self, hello: "_Control", sender: Address) -> None:
        # Only who receives at an address can have it entered here; the challenge is no longer than what asks for it.
        cookie = hmac.digest(self._secret, hello.id + repr(sender).encode(), hashlib.sha256)[:_COOKIE_BYTES]
        if not hmac.compare_digest(cookie, hello.cookie):
            self._socket.sendto(_build(_CHALLENGE, hello.role, hello.id, self._key, cookie), sender)
            return
        if hello.id not in self._sessions and len(self._sessions) >= _MAX_PAIRS:
            return
        ends = self._sessions.setdefault(hello.id, [None, None])
        before, other = ends[hello.role], ends[1 - hello.role]
        if before is not None and before.address != sender:
            self._peers.pop(before.address, None)
        ends[hello.role] = _RelayEnd(sender, time.monotonic())
        if other is not None:
            self._peers[sender], self._peers[other.address] = other.address, sender

    def _sweep(self) -> None:
        now = time.monotonic()
        if now - self._swept < _POLL_S:
            return
        self._swept = now
        for name, ends in list(self._sessions.items()):
            if all(end is None or now - end.seen > _SILENT_S for end in ends):
                del self._sessions[name]
                for end in ends:
                    if end is not None:
                        self._peers.pop(end.address, None)


@dataclasses.dataclass(frozen=True)
class _RelayEnd:
    address: Address
    seen: float


@dataclasses.dataclass(frozen=True)
class _Control:
    kind: int
    role: int
    id: bytes
    cookie: bytes


def _build(kind: int, role: int, name: bytes, key: bytes, cookie: bytes = bytes(_COOKIE_BYTES)) -> bytes:
    body = _MAGIC + bytes((kind, role)) + name + cookie
    return body + hmac.digest(key, body, hashlib.sha256)[:_MAC_BYTES]


def _parse(data: bytes, key: bytes) -> _Control | None:
    """A control datagram; None: it is none, or not of one who holds the key."""
    if len(data) != _CONTROL_BYTES or not data.startswith(_MAGIC):
        return None
    body, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
    role, start = body[5], len(_MAGIC) + 2
    if role > 1 or not hmac.compare_digest(mac, hmac.digest(key, body, hashlib.sha256)[:_MAC_BYTES]):
        return None
    return _Control(body[4], role, body[start : start + _ID_BYTES], body[start + _ID_BYTES :])


class _Leg:
    """One end of one session: its socket, and the paths to the other end that have been seen to work."""

    def __init__(self, role: int, name: bytes, key: bytes, relay: Address | None, relay_key: str) -> None:
        self.id, self.key, self._role = name, key, role
        self.socket = _udp_socket("0.0.0.0")  # noqa: S104 - the other end may come from anywhere; it holds the key
        self.socket.setblocking(False)
        # What is larger than the path takes is dropped, so that QUIC finds the size that is not.
        self.socket.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
        self.candidates: list[Address] = []
        self.relay = relay
        self._relay_key, self._cookie = relay_key.encode(), bytes(_COOKIE_BYTES)
        self._seen: dict[Address, float] = {}  # when an address last answered
        self._heard: set[Address] = set()  # addresses that showed the key
        self._next_punch = 0.0
        self.last_heard = time.monotonic()
        self.reply_to: Address | None = None

    def path(self) -> Address | None:
        """Where to send: a direct address that answers, or else the relay, if it does. For any thread."""
        fresh = [address for address, seen in list(self._seen.items()) if time.monotonic() - seen < _SILENT_S]
        return next((address for address in fresh if address != self.relay), fresh[0] if fresh else None)

    def describe(self) -> str:
        path = self.path()
        return "none" if path is None else "relay" if path == self.relay else "direct"

    def wait_for_path(self, stop: threading.Event, deadline: float, direct_first_s: float) -> None:
        started = time.monotonic()
        while True:
            self.tick()
            for _ in self.receive():
                pass
            path, now = self.path(), time.monotonic()
            if path is not None and (path != self.relay or now - started >= direct_first_s):
                return
            if now > deadline or stop.wait(0.01):
                raise UnavailableError("no datagram gets through to the QUIC server, neither directly nor by a relay")

    def tick(self) -> None:
        """Sends what is due: punches, keepalives, and the relay's hello."""
        now = time.monotonic()
        if now < self._next_punch:
            return
        self._next_punch = now + (_KEEPALIVE_S if self._seen else _PUNCH_S)
        for address in {*self.candidates, *self._heard}:
            self._send(_build(_PUNCH, self._role, self.id, self.key), address)
        if self.relay is not None:
            self._send(_build(_HELLO, self._role, self.id, self._relay_key, self._cookie), self.relay)
            self._send(_build(_PUNCH, self._role, self.id, self.key), self.relay)

    def receive(self) -> Iterator[bytes]:
        """The other end's packets that have arrived."""
        for _ in range(_BURST):
            try:
                data, sender = self.socket.recvfrom(_MAX_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:
                continue  # an earlier datagram could not be delivered
            if data.startswith(_MAGIC):
                self._control(data, sender)
            elif sender in self._heard:
                self.last_heard, self.reply_to = time.monotonic(), sender
                yield data

    def send(self, data: bytes) -> None:
        """Sends a packet where the other end was last heard, or where it answers."""
        path = self.reply_to if self._role == 1 and self.reply_to is not None else self.path()
        if path is not None:
            self._send(data, path)

    def _control(self, data: bytes, sender: Address) -> None:
        if sender == self.relay and (challenge := _parse(data, self._relay_key)) and challenge.kind == _CHALLENGE:
            self._cookie = challenge.cookie
            self._next_punch = 0.0
            return
        control = _parse(data, self.key)
        if control is None or control.role == self._role or control.id != self.id:
            return
        self._heard.add(sender)
        self.last_heard = time.monotonic()
        if control.kind == _PUNCH:
            self._send(_build(_PUNCHED, self._role, self.id, self.key), sender)
        elif control.kind == _PUNCHED:
            self._seen[sender] = time.monotonic()

    def _send(self, data: bytes, address: Address) -> None:
        with contextlib.suppress(OSError):  # too large for the path, or no route for now: the packet is lost
            self.socket.sendto(data, address)


def _serve_robot(
    store: Store,
    name: str,
    join: dict[str, Any],
    server: dict[str, Any],
    *,
    stun_servers: Sequence[Address],
    upstream: Address,
    stop: threading.Event,
) -> None:
    """Answers a robot in the store and passes its packets on, in a thread of its own: its faults are no other's."""
    try:
        relay = _find_relay(server["relay"], relay_only=server["relay_only"])
        leg = _Leg(1, bytes.fromhex(name), bytes.fromhex(join["key"]), relay, server["relay_key"])
        with contextlib.closing(leg.socket), _udp_socket("127.0.0.1") as local:
            leg.candidates = [tuple(address) for address in join["addresses"]]
            addresses = [] if server["relay_only"] else _candidates(leg.socket, stun_servers)
            _insist(stop, time.monotonic() + _SILENT_S, store.put, ANSWER + name, {"addresses": addresses})
            _pump(leg, local, upstream, stop)
    except Exception as error:
        logger.warning("a robot is not served: %r", error)


def _insist(stop: threading.Event, deadline: float, operation: Callable[..., Any], *arguments: Any) -> Any:
    """The result of an operation of the store, which is tried again while it fails.

    Raises:
        UnavailableError: at the deadline or at `stop` it still fails, and how.
    """
    while True:
        try:
            return operation(*arguments)
        except Exception as error:  # of the store's own kind
            if time.monotonic() > deadline or stop.wait(_POLL_S / 5):
                raise UnavailableError(f"the store that robot and server share fails: {error!r}") from error


def _forget(store: Store, *keys: str) -> None:
    for key in keys:
        try:
            store.pop(key, None)
        except Exception as error:  # of the store's own kind; what stays there does no harm
            logger.warning("%s stays in the store: %r", key, error)


def _find_relay(relay: Sequence[Any] | None, *, relay_only: bool) -> Address | None:
    """The relay's number for its name.

    Raises:
        UnavailableError: it has none, and nothing but the relay is to be tried.
    """
    if relay is None:
        return None
    host, port = relay
    try:
        return socket.gethostbyname(host), port
    except OSError as error:
        if relay_only:
            raise UnavailableError(f"the relay {host} is not found: {error}") from error
        logger.warning("the relay %s is not found, only direct paths are tried: %s", host, error)
        return None


def _pump(leg: _Leg, local: socket.socket, upstream: Address | None, stop: threading.Event) -> None:
    """Passes packets between the other end and a local program until the other end has been silent for too long.

    Args:
        upstream: the local program; None: whoever sends to `local`.
    """
    local.setblocking(False)
    user = upstream
    with selectors.DefaultSelector() as selector:
        selector.register(leg.socket, selectors.EVENT_READ)
        selector.register(local, selectors.EVENT_READ)
        while not stop.is_set() and time.monotonic() - leg.last_heard < _SILENT_S:
            leg.tick()
            selector.select(_PUNCH_S)
            for packet in leg.receive():
                if user is not None:
                    with contextlib.suppress(OSError):
                        local.sendto(packet, user)
            for _ in range(_BURST):
                try:
                    packet, sender = local.recvfrom(_MAX_DATAGRAM)
                except OSError:
                    break
                user = upstream or sender
                leg.send(packet)


def _candidates(bound: socket.socket, stun_servers: Sequence[Address]) -> list[Address]:
    """Addresses at which the other end may reach a socket: this machine's own, and those that STUN servers see."""
    port = bound.getsockname()[1]
    found: list[Address] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; the route to anywhere says which address is ours
        found.append((probe.getsockname()[0], port))
    for server in stun_servers:
        with contextlib.suppress(OSError):
            if (address := _ask_stun(bound, server)) is not None and address not in found:
                found.append(address)
    return found


def _ask_stun(bound: socket.socket, server: Address, timeout_s: float = 1.0) -> Address | None:
    """The address that a STUN server sees (RFC 8489: a Binding request, and its XOR-MAPPED-ADDRESS)."""
    transaction = secrets.token_bytes(12)
    cookie = 0x2112A442
    target = (socket.gethostbyname(server[0]), server[1])
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        bound.sendto(struct.pack("!HHI", 1, 0, cookie) + transaction, target)
        with selectors.DefaultSelector() as selector:
            selector.register(bound, selectors.EVENT_READ)
            if not selector.select(timeout_s / 4):
                continue
        data, sender = bound.recvfrom(_MAX_DATAGRAM)
        if sender == target and data[:2] == b"\x01\x01" and data[8:20] == transaction:
            return _mapped_address(data[20:], cookie)
    return None


def _mapped_address(attributes: bytes, cookie: int) -> Address | None:
    while len(attributes) >= 4:
        kind, length = struct.unpack("!HH", attributes[:4])
        value = attributes[4 : 4 + length]
        if kind == 0x0020 and len(value) == 8 and value[1] == 1:
            port, address = struct.unpack("!HI", value[2:])
            return socket.inet_ntoa(struct.pack("!I", address ^ cookie)), port ^ (cookie >> 16)
        attributes = attributes[4 + length + -length % 4 :]
    return None


def _udp_socket(host: str, port: int = 0) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        bound.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
    bound.bind((host, port))
    return bound


# Linux's, which Python's socket module does not name.
_IP_MTU_DISCOVER, _IP_PMTUDISC_DO = 10, 2


def main() -> None:
    """Runs a relay."""
    logging.basicConfig(level=logging.INFO)
    parser = argparse.ArgumentParser(prog="python -m openpi_flash_client.portal", description=main.__doc__)
    default = f"0.0.0.0:{RELAY_PORT}"
    parser.add_argument("address", nargs="?", type=_read_address, default=default, help=f"HOST:PORT, UDP ({default})")
    address = parser.parse_args().address
    key = os.environ.get("QUIC_RELAY_KEY", "")
    if not key:
        parser.error("QUIC_RELAY_KEY is not set: without a key, anybody could use this relay")
    relay = Relay(address, key)
    logger.info("relaying on UDP port %d", relay.port)
    relay.run(threading.Event())


def _read_address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: HOST:PORT is expected")
    return host, int(port)


if __name__ == "__main__":
    main()
