"""The replicas of a service: found behind names, each followed by its own health; the least busy one gets a request.

gRPC's own balancing does not do here: it asks the name service again only when a connection is lost, so that replicas
which an autoscaler adds would stay idle, and it deals out streams, which are kept, where requests are to be dealt out.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from openpi_flash_common.errors import UnavailableError
from openpi_flash_common.settings import BackendSettings, SettingsError

from openpi_flash_gateway.backend import Access, Backend, OnChange

logger = logging.getLogger(__name__)

_RESOLVE_INTERVAL_S = 5.0


class Replica(Backend):
    """One of the hosts that serve.

    Attributes:
        address: `ip:port`.
        host: the configured name that stands for it.
        num_in_flight: requests that it is working on.
        last_picked: how many requests had been dealt out when it got its last one.
    """

    def __init__(
        self, name: str, service: str, address: str, access: Access, *, max_message_bytes: int, host: str
    ) -> None:
        """Takes what a Backend does; the name is for people, e.g. `planner`, and gets the address appended."""
        super().__init__(
            f"{name} at {address}", service, address, access, max_message_bytes=max_message_bytes, host=host
        )
        self.address = address
        self.host = host
        self.num_in_flight = 0
        self.last_picked = 0

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Counts a request."""
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1


ReplicaT = TypeVar("ReplicaT", bound=Replica)


class Replicas(Generic[ReplicaT]):
    """All replicas of one service. They come and go; `watch` looks for them."""

    def __init__(
        self,
        name: str,
        setting: str,
        addresses: str,
        settings: BackendSettings,
        make: Callable[[str, str, Access], ReplicaT],
    ) -> None:
        """Describes the replicas.

        Args:
            name: for people, e.g. `planner`.
            setting: that the addresses come from, for errors.
            addresses: `host:port`, several joined by commas. Each host that a name stands for is a replica.
            settings: how they are reached.
            make: from the address and host of a replica, and what to show it, to the replica.

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

    @property
    def replicas(self) -> Sequence[ReplicaT]:
        """Those that are known, ready or not."""
        return tuple(self._replicas.values())

    @property
    def ready(self) -> Sequence[ReplicaT]:
        """Those that answer requests now."""
        return tuple(replica for replica in self._replicas.values() if not replica.not_ready_reason)

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
        try:
            while True:
                await self._resolve(on_change)
                await asyncio.sleep(_RESOLVE_INTERVAL_S)
        finally:
            for watch in self._watches.values():
                watch.cancel()
            await asyncio.gather(*self._watches.values(), return_exceptions=True)

    async def close(self) -> None:
        """Ends every call."""
        await asyncio.gather(*(replica.close() for replica in self._replicas.values()))

    async def _resolve(self, on_change: OnChange) -> None:
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
            self._watches[address] = asyncio.create_task(replica.watch(on_change))
        for address in self._replicas.keys() - found.keys():
            replica = self._replicas.pop(address)
            self._watches.pop(address).cancel()
            await replica.close()
            await on_change()


async def _addresses(host: str, port: int) -> list[str]:
    """`ip:port` of every host that a name stands for, of one family: a machine with two has two addresses."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = dict.fromkeys(info[4][0] for info in infos if info[0] == infos[0][0])
    return [f"[{name}]:{port}" if ":" in str(name) else f"{name}:{port}" for name in hosts]


def _split(setting: str, address: str) -> tuple[str, int]:
    host, _, port = address.strip().rpartition(":")
    if not host or not port.isdecimal():
        raise SettingsError(f"{setting}: {address!r}: expected host:port")
    return host.strip("[]"), int(port)
