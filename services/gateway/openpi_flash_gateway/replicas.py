"""The replicas of a service: found behind names, each followed by its own health; the least busy one gets a request.

gRPC's own balancing does not do here: it asks the name service again only when a connection is lost, so that replicas
which an autoscaler adds would stay idle, and it deals out streams, which are kept, where requests are to be dealt out.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from openpi_flash_common.errors import UnavailableError
from openpi_flash_common.settings import BackendSettings, SettingsError

from openpi_flash_gateway.backend import Access, Backend, MessageT, OnChange

logger = logging.getLogger(__name__)

_RESOLVE_INTERVAL_S = 5.0
_METADATA_TIMEOUT_S = 10.0


class Replica(Backend, Generic[MessageT]):
    """One of the hosts that serve.

    Attributes:
        address: `ip:port`.
        host: the configured name that stands for it.
        last_picked: how many requests had been dealt out when it got its last one.
        metadata: what it said when it last became ready.
    """

    def __init__(
        self,
        name: str,
        service: str,
        address: str,
        access: Access,
        metadata: tuple[str, type[MessageT]],
        *,
        max_message_bytes: int,
        host: str,
    ) -> None:
        """Takes what a Backend does; the name is for people, e.g. `planner`, and gets the address appended.

        Args:
            metadata: the method by which it describes itself, and what that answers.
        """
        super().__init__(
            f"{name} at {address}", service, address, access, max_message_bytes=max_message_bytes, host=host
        )
        self.address = address
        self.host = host
        self.last_picked = 0
        self._describe, kind = metadata
        self.metadata = kind()

    async def on_serving(self) -> None:
        deadline = time.monotonic() + _METADATA_TIMEOUT_S
        self.metadata = await self.ask(self._describe, b"", type(self.metadata), deadline)


ReplicaT = TypeVar("ReplicaT", bound=Replica[Any])


class Replicas(Generic[ReplicaT, MessageT]):
    """All replicas of one service. They come and go; `watch` looks for them."""

    def __init__(
        self,
        name: str,
        setting: str,
        addresses: str,
        settings: BackendSettings,
        make: Callable[[str, str, Access], ReplicaT],
        *,
        metadata: MessageT,
    ) -> None:
        """Describes the replicas.

        Args:
            name: for people, e.g. `planner`.
            setting: that the addresses come from, for errors.
            addresses: `host:port`, several joined by commas. Each host that a name stands for is a replica.
            settings: how they are reached.
            make: from the address and host of a replica, and what to show it, to the replica.
            metadata: what is said of them before one has described itself.

        Raises:
            SettingsError: an address is none, or a certificate or key cannot be read.
        """
        self._name = name
        self._names = [_split(setting, address) for address in addresses.split(",")]
        self._access = Access.load(settings)
        self._make = make
        self._replicas: dict[str, ReplicaT] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._unresolved: dict[str, str] = {}
        self._num_picked = 0
        self._metadata = metadata

    @property
    def replicas(self) -> Sequence[ReplicaT]:
        """Those that are known, ready or not."""
        return tuple(self._replicas.values())

    @property
    def ready(self) -> Sequence[ReplicaT]:
        """Those that answer requests now."""
        return tuple(replica for replica in self._replicas.values() if not replica.not_ready_reason)

    @property
    def metadata(self) -> MessageT:
        """What a ready replica says of itself; while none is ready, what one last said."""
        for replica in self.ready:
            self._metadata = replica.metadata
        return self._metadata

    @property
    def not_ready_reason(self) -> str:
        """Why no request can be answered now, for people; empty: a replica is ready."""
        reasons = [replica.not_ready_reason for replica in self._replicas.values()]
        if "" in reasons:
            return ""
        return "; ".join((*reasons, *self._unresolved.values())) or f"no {self._name} has been found yet"

    def pick(self, other_than: ReplicaT | None = None) -> ReplicaT:
        """A ready replica that has the least to do, and of several such the one that waited longest for a request.

        Args:
            other_than: taken only where there is no other.

        Raises:
            UnavailableError: none is ready; says why.
        """
        ready = self.ready
        if not ready:
            raise UnavailableError(self.not_ready_reason)
        picked = min(ready, key=lambda replica: (replica is other_than, replica.num_in_flight, replica.last_picked))
        self._num_picked += 1
        picked.last_picked = self._num_picked
        return picked

    async def watch(self, on_change: OnChange) -> None:
        """Looks for replicas and follows their health until cancelled; tells of each change."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._resolve(tasks, on_change)
                await asyncio.sleep(_RESOLVE_INTERVAL_S)

    async def close(self) -> None:
        """Ends every call."""
        await asyncio.gather(*(replica.close() for replica in self._replicas.values()))

    async def _resolve(self, tasks: asyncio.TaskGroup, on_change: OnChange) -> None:
        found: dict[str, str] = {}
        unresolved: dict[str, str] = {}
        for host, port in self._names:
            try:
                found |= dict.fromkeys(await _addresses(host, port), host)
            except OSError as error:  # the name service is away: what is known stays
                unresolved[host] = f"the {self._name}'s address {host} cannot be resolved: {error.strerror}"
                found |= {address: host for address, replica in self._replicas.items() if replica.host == host}
        for host in unresolved.keys() - self._unresolved.keys():
            logger.warning("%s", unresolved[host])
        self._unresolved = unresolved
        for address in found.keys() - self._replicas.keys():
            replica = self._make(address, found[address], self._access)
            self._replicas[address] = replica
            self._watches[address] = tasks.create_task(replica.watch(on_change))
        for address in self._replicas.keys() - found.keys():
            replica = self._replicas.pop(address)
            self._watches.pop(address).cancel()
            tasks.create_task(replica.retire())
            await on_change()


async def _addresses(host: str, port: int) -> list[str]:
    """`ip:port` of every host that a name stands for, of one family, since a machine with two has two addresses: IPv4
    where there is any."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found = {info[0] for info in infos}
    family = socket.AF_INET if socket.AF_INET in found else socket.AF_INET6
    hosts = dict.fromkeys(info[4][0] for info in infos if info[0] == family)
    return [f"[{name}]:{port}" if ":" in str(name) else f"{name}:{port}" for name in hosts]


def _split(setting: str, address: str) -> tuple[str, int]:
    host, _, port = address.strip().rpartition(":")
    if not host or not port.isdecimal():
        raise SettingsError(f"{setting}: {address!r}: expected host:port")
    try:
        host.encode("idna")  # as getaddrinfo will
    except UnicodeError as error:
        raise SettingsError(f"{setting}: {address!r}: the host cannot be a name ({error})") from error
    return host.strip("[]"), int(port)
