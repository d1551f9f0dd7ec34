"""The planner service as the gateway sees it: replicas, each of which may come and go, with one configuration."""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence

from google.protobuf.message import DecodeError
from openpi_flash.v1 import planner_pb2
from openpi_flash_common.errors import InternalError, InvalidArgumentError, ServiceError, UnavailableError
from openpi_flash_common.settings import GatewaySettings, SettingsError
from openpi_flash_common.telemetry import NO_TRACE, TraceContext

from openpi_flash_gateway.backend import Backend, OnChange

logger = logging.getLogger(__name__)

SERVICE: str = planner_pb2.DESCRIPTOR.services_by_name["PlannerService"].full_name

_CALL_TIMEOUT_S = 5.0
_RESOLVE_INTERVAL_S = 5.0


class PlannerReplica(Backend):
    """One planner. When it becomes ready it is given the changes that were made to the configuration while it was away.

    Attributes:
        address: `ip:port`.
        host: the configured name that stands for it.
        num_in_flight: subtasks that it is writing.
        metadata: what it said when it last became ready.
    """

    def __init__(
        self, settings: GatewaySettings, address: str, host: str, changes: planner_pb2.UpdateConfigRequest
    ) -> None:
        """Raises as a Backend.

        Args:
            host: also whom its certificate must name.
            changes: those that hold at present; read whenever the replica becomes ready.
        """
        super().__init__(
            f"planner at {address}",
            SERVICE,
            address,
            settings.planner,
            max_message_bytes=settings.max_message_bytes,
            host=host,
        )
        self.address = address
        self.host = host
        self.num_in_flight = 0
        self.metadata = planner_pb2.GetPlannerMetadataResponse()
        self._changes = changes

    async def generate(self, request: bytes, deadline: float, trace: TraceContext) -> bytes:
        """A serialized GenerateSubtaskRequest to a GenerateSubtaskResponse. Raises ServiceErrors."""
        self.num_in_flight += 1
        try:
            return await self.call("GenerateSubtask", request, deadline, trace)
        finally:
            self.num_in_flight -= 1

    async def config(self) -> planner_pb2.PlannerConfig:
        """The configuration in force there. Raises ServiceErrors."""
        answer = await self.call("GetConfig", b"", time.monotonic() + _CALL_TIMEOUT_S)
        return planner_pb2.GetConfigResponse.FromString(answer).config

    async def update(self, change: planner_pb2.UpdateConfigRequest) -> planner_pb2.PlannerConfig:
        """Changes the configuration there; returns the one in force afterwards. Raises ServiceErrors."""
        answer = await self.call("UpdateConfig", change.SerializeToString(), time.monotonic() + _CALL_TIMEOUT_S)
        return planner_pb2.UpdateConfigResponse.FromString(answer).config

    async def on_serving(self) -> None:
        answer = await self.call("GetPlannerMetadata", b"", time.monotonic() + _CALL_TIMEOUT_S)
        self.metadata = planner_pb2.GetPlannerMetadataResponse.FromString(answer)
        if self._changes.ListFields():
            await self.update(self._changes)


class PlannerBackend:
    """All replicas of the planner. A request goes to a ready one that has the least to do."""

    def __init__(self, settings: GatewaySettings, addresses: str) -> None:
        """Describes the replicas; `watch` looks for them.

        Args:
            addresses: `host:port`, several joined by commas. Each host that a name stands for is a replica.

        Raises:
            SettingsError: an address is none.
        """
        self._settings = settings
        self._names = [_split(address) for address in addresses.split(",")]
        self._replicas: dict[str, PlannerReplica] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._changes = planner_pb2.UpdateConfigRequest()
        self._metadata = planner_pb2.GetPlannerMetadataResponse()

    @property
    def replicas(self) -> Sequence[PlannerReplica]:
        """Those that are known, ready or not."""
        return tuple(self._replicas.values())

    @property
    def not_ready_reason(self) -> str:
        """Why no subtask can be written now, for people; empty: a replica is ready."""
        reasons = [replica.not_ready_reason for replica in self._replicas.values()]
        return "" if "" in reasons else "; ".join(reasons) or "no planner has been found yet"

    @property
    def metadata(self) -> planner_pb2.GetPlannerMetadataResponse:
        """What a ready replica says of itself; while none is ready, what one last said."""
        for replica in self._replicas.values():
            if not replica.not_ready_reason:
                self._metadata = replica.metadata
        return self._metadata

    async def generate(
        self, request: bytes, deadline: float, trace: TraceContext = NO_TRACE
    ) -> planner_pb2.GenerateSubtaskResponse:
        """Has a subtask written; where a replica is lost over it, by a second one.

        Args:
            request: a serialized GenerateSubtaskRequest.
            deadline: on the clock of `time.monotonic`, in seconds.
            trace: sent along.

        Raises:
            ServiceError: the planner's refusal, or why there is no answer.
        """
        replica = self._least_busy()
        try:
            answer = await replica.generate(request, deadline, trace)
        except UnavailableError as error:
            others = [other for other in self._replicas.values() if other is not replica and not other.not_ready_reason]
            if not others:
                raise
            logger.info("no answer from the %s, trying another: %s", replica.name, error.message)
            answer = await min(others, key=_load).generate(request, deadline, trace)
        try:
            return planner_pb2.GenerateSubtaskResponse.FromString(answer)
        except DecodeError as error:
            raise InternalError(f"the {replica.name} did not answer with a GenerateSubtaskResponse") from error

    async def configs(self) -> dict[str, planner_pb2.PlannerConfig | ServiceError]:
        """The configuration in force at each replica, or why it is not known, by address."""
        return await self._at_each(lambda replica: replica.config())

    async def update(
        self, change: planner_pb2.UpdateConfigRequest
    ) -> dict[str, planner_pb2.PlannerConfig | ServiceError]:
        """Changes the configuration of all replicas; those that are away now get the change when they return.

        Returns:
            By address the configuration afterwards, or why it is not changed there.

        Raises:
            InvalidArgumentError: the change cannot be; names the field.
            UnavailableError: there is no replica within reach to check and take it.
        """
        results = await self._at_each(lambda replica: replica.update(change))
        refusals = [result for result in results.values() if isinstance(result, InvalidArgumentError)]
        if refusals:
            raise refusals[0]
        if all(isinstance(result, ServiceError) for result in results.values()):
            raise UnavailableError(f"no planner took the change: {self.not_ready_reason or 'none answered'}")
        self._changes.MergeFrom(change)
        return results

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

    def _least_busy(self) -> PlannerReplica:
        ready = [replica for replica in self._replicas.values() if not replica.not_ready_reason]
        if not ready:
            raise UnavailableError(self.not_ready_reason)
        return min(ready, key=_load)

    async def _at_each(
        self, ask: Callable[[PlannerReplica], Awaitable[planner_pb2.PlannerConfig]]
    ) -> dict[str, planner_pb2.PlannerConfig | ServiceError]:
        async def result(replica: PlannerReplica) -> planner_pb2.PlannerConfig | ServiceError:
            try:
                return await ask(replica)
            except ServiceError as error:
                return error

        replicas = self.replicas
        results = await asyncio.gather(*(result(replica) for replica in replicas))
        return {replica.address: answer for replica, answer in zip(replicas, results, strict=True)}

    async def _resolve(self, on_change: OnChange) -> None:
        found: dict[str, str] = {}
        for host, port in self._names:
            try:
                found |= dict.fromkeys(await _addresses(host, port), host)
            except OSError as error:  # the name service is away: what is known stays
                logger.warning("the planner's address %s cannot be resolved: %s", host, error.strerror)
                found |= {address: host for address, replica in self._replicas.items() if replica.host == host}
        for address in found.keys() - self._replicas.keys():
            replica = PlannerReplica(self._settings, address, found[address], self._changes)
            self._replicas[address] = replica
            self._watches[address] = asyncio.create_task(replica.watch(on_change))
        for address in self._replicas.keys() - found.keys():
            replica = self._replicas.pop(address)
            self._watches.pop(address).cancel()
            await replica.close()
            await on_change()


def _load(replica: PlannerReplica) -> int:
    return replica.num_in_flight


async def _addresses(host: str, port: int) -> list[str]:
    """`ip:port` of every host that a name stands for, of one family: a machine with two has two addresses."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = dict.fromkeys(info[4][0] for info in infos if info[0] == infos[0][0])
    return [f"[{name}]:{port}" if ":" in str(name) else f"{name}:{port}" for name in hosts]


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.strip().rpartition(":")
    if not host or not port.isdecimal():
        raise SettingsError(f"gateway.planner.address: {address!r}: expected host:port")
    return host.strip("[]"), int(port)
