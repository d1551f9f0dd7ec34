"""The planner service as the gateway sees it: replicas, each of which may come and go, with one configuration."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from openpi_flash.v1 import planner_pb2
from openpi_flash_common.errors import InvalidArgumentError, ServiceError, UnavailableError
from openpi_flash_common.settings import GatewaySettings
from openpi_flash_common.telemetry import NO_TRACE, TraceContext

from openpi_flash_gateway.backend import Access
from openpi_flash_gateway.replicas import Replica, Replicas

logger = logging.getLogger(__name__)

SERVICE: str = planner_pb2.DESCRIPTOR.services_by_name["PlannerService"].full_name

_CALL_TIMEOUT_S = 5.0


class PlannerReplica(Replica[planner_pb2.GetPlannerMetadataResponse]):
    """One planner. When it becomes ready it is given the changes that were made to the configuration while it was
    away."""

    def __init__(
        self,
        settings: GatewaySettings,
        address: str,
        host: str,
        access: Access,
        changes: planner_pb2.UpdateConfigRequest,
    ) -> None:
        """Takes what a Replica does, and the changes of the configuration.

        Args:
            changes: those that hold at present; read whenever the replica becomes ready.
        """
        metadata = ("GetPlannerMetadata", planner_pb2.GetPlannerMetadataResponse)
        super().__init__(
            "planner", SERVICE, address, access, metadata, max_message_bytes=settings.max_message_bytes, host=host
        )
        self._changes = changes

    async def generate(
        self, request: bytes, deadline: float, trace: TraceContext
    ) -> planner_pb2.GenerateSubtaskResponse:
        """Answers a serialized GenerateSubtaskRequest. Raises ServiceErrors."""
        return await self.ask("GenerateSubtask", request, planner_pb2.GenerateSubtaskResponse, deadline, trace)

    async def config(self) -> planner_pb2.PlannerConfig:
        """The configuration in force there. Raises ServiceErrors."""
        deadline = time.monotonic() + _CALL_TIMEOUT_S
        return (await self.ask("GetConfig", b"", planner_pb2.GetConfigResponse, deadline)).config

    async def update(self, change: planner_pb2.UpdateConfigRequest) -> planner_pb2.PlannerConfig:
        """Changes the configuration there; returns the one in force afterwards. Raises ServiceErrors."""
        deadline, request = time.monotonic() + _CALL_TIMEOUT_S, change.SerializeToString()
        return (await self.ask("UpdateConfig", request, planner_pb2.UpdateConfigResponse, deadline)).config

    async def on_serving(self) -> None:
        await super().on_serving()
        if self._changes.ListFields():
            await self.update(self._changes)


class PlannerBackend(Replicas[PlannerReplica, planner_pb2.GetPlannerMetadataResponse]):
    """All replicas of the planner, with one configuration."""

    def __init__(self, settings: GatewaySettings, addresses: str) -> None:
        """Describes the replicas, as Replicas do."""
        self._changes = planner_pb2.UpdateConfigRequest()
        super().__init__(
            "planner",
            "gateway.planner.address",
            addresses,
            settings.planner,
            lambda address, host, access: PlannerReplica(settings, address, host, access, self._changes),
            metadata=planner_pb2.GetPlannerMetadataResponse(),
        )

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
        replica = self.pick()
        try:
            return await replica.generate(request, deadline, trace)
        except UnavailableError as error:
            other = self.pick(other_than=replica)
            if other is replica:
                raise
            logger.info("no answer from the %s, trying another: %s", replica.name, error.message)
            return await other.generate(request, deadline, trace)

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
