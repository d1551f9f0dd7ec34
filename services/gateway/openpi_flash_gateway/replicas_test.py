"""Several action services behind one gateway: requests are spread over them, and follow them as they come and go."""

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from openpi_flash.v1 import inference_pb2
from openpi_flash_common.errors import UnavailableError
from openpi_flash_common.settings import SettingsError

from openpi_flash_gateway import replicas
from openpi_flash_gateway.action_backend import ActionBackend
from openpi_flash_gateway.conftest import FakeActionService, make_settings
from openpi_flash_gateway.grpc_service_test import infer_request


async def infer(backend: ActionBackend, prompt: str = "", timeout_s: float = 10) -> None:
    assert await backend.infer((infer_request(prompt).SerializeToString(),), time.monotonic() + timeout_s)


@pytest.fixture
async def services() -> AsyncIterator[list[FakeActionService]]:
    services = [FakeActionService(), FakeActionService()]
    for service in services:
        await service.start()
    yield services
    for service in services:
        service.release.set()
        await service.stop()


@contextlib.asynccontextmanager
async def running_backend(tmp_path: Path, addresses: str, ready: int) -> AsyncIterator[ActionBackend]:
    settings = make_settings(tmp_path, action={"address": addresses})
    backend = ActionBackend(settings.gateway, settings.action_address or "")
    watch = asyncio.create_task(backend.watch(ignore))
    try:
        await until(lambda: len(backend.ready) == ready, "replicas to be ready")
        yield backend
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await backend.close()


async def ignore() -> None: ...


def addresses(services: Sequence[FakeActionService]) -> str:
    return ",".join(f"127.0.0.1:{service.port}" for service in services)


async def until(condition, what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited 20 s for {what}"
        await asyncio.sleep(0.01)


async def test_one_robot_and_several_use_all_replicas(services, tmp_path):
    async with running_backend(tmp_path, addresses(services), ready=2) as backend:
        for _ in range(6):
            await infer(backend)
        assert [len(service.received) for service in services] == [3, 3]
        assert [service.num_streams for service in services] == [1, 1], "streams are kept"
        await asyncio.gather(*(infer(backend) for _ in range(8)))
        assert [len(service.received) for service in services] == [7, 7]


async def test_a_busy_replica_is_spared(services, tmp_path):
    async with running_backend(tmp_path, addresses(services), ready=2) as backend:
        slow = asyncio.create_task(infer(backend, "slow"))
        await until(lambda: sum(len(service.received) for service in services) == 1, "the slow request")
        busy, idle = sorted(services, key=lambda service: -len(service.received))
        for _ in range(3):
            await infer(backend)
        assert (len(busy.received), len(idle.received)) == (1, 3)
        busy.release.set()
        await slow


async def test_a_replica_that_goes_costs_no_request_and_gets_its_share_when_it_returns(services, tmp_path):
    first, second = services
    async with running_backend(tmp_path, addresses(services), ready=2) as backend:
        robots = [asyncio.create_task(drive(backend)) for _ in range(4)]
        await until(lambda: min(len(service.received) for service in services) > 10, "both to be used")
        await first.stop()
        before = len(first.received), len(second.received)
        await until(lambda: len(second.received) > before[1] + 20, "the other to answer")
        assert len(first.received) == before[0]
        await first.start()
        await until(lambda: len(first.received) > before[0] + 10, "the one that returned to be used")
        for robot in robots:
            assert not robot.done(), robot.exception()
            robot.cancel()
        await second.stop()
        await first.stop()
        await until(lambda: len(backend.ready) == 0, "none to be ready")
        with pytest.raises(UnavailableError, match="action service at 127"):
            await infer(backend)


async def drive(backend: ActionBackend) -> None:
    """A robot that stops at the first request without an answer."""
    while True:
        await infer(backend)
        await asyncio.sleep(0.001)


async def test_replicas_are_looked_for_behind_a_name(services, tmp_path, monkeypatch):
    first, second = services
    behind_name = [first]

    async def resolve(host: str, _: int) -> list[str]:
        assert host == "action.internal"
        return addresses(behind_name).split(",") if behind_name else []

    monkeypatch.setattr(replicas, "_addresses", resolve)
    monkeypatch.setattr(replicas, "_RESOLVE_INTERVAL_S", 0.02)
    async with running_backend(tmp_path, "action.internal:50052", ready=1) as backend:
        await infer(backend)
        behind_name.append(second)  # as an autoscaler does; the connection to the first stays as it is
        await until(lambda: len(backend.ready) == 2, "the second to be found")
        for _ in range(4):
            await infer(backend)
        assert sorted(len(service.received) for service in services) == [2, 3]
        behind_name.remove(first)
        await until(lambda: len(backend.replicas) == 1, "the first to be dropped")
        count = len(first.received)
        for _ in range(3):
            await infer(backend)
        assert len(first.received) == count


async def test_a_replica_that_is_dropped_answers_what_it_has(services, tmp_path, monkeypatch):
    first, second = services
    behind_name = [first]

    async def resolve(*_: object) -> list[str]:
        return addresses(behind_name).split(",")

    monkeypatch.setattr(replicas, "_addresses", resolve)
    monkeypatch.setattr(replicas, "_RESOLVE_INTERVAL_S", 0.02)
    async with running_backend(tmp_path, "action.internal:50052", ready=1) as backend:
        slow = asyncio.create_task(infer(backend, "slow"))
        await first.wait_received(1)
        behind_name[:] = [second]
        await until(
            lambda: len(backend.ready) == 1 and backend.replicas[0].address.endswith(str(second.port)), "change"
        )
        await infer(backend)
        assert not slow.done()
        first.release.set()
        await slow
        assert len(first.received) == 1
        await until(lambda: first.num_open_streams == 0, "the connection to be closed")


async def test_a_watch_that_fails_is_no_secret(services, tmp_path):
    async def fail() -> None:
        raise ZeroDivisionError

    settings = make_settings(tmp_path, action={"address": addresses(services)})
    backend = ActionBackend(settings.gateway, settings.action_address or "")
    with pytest.raises(ExceptionGroup):
        await asyncio.wait_for(backend.watch(fail), 20)
    await backend.close()


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["::1", "127.0.0.1", "127.0.0.2"], ["127.0.0.1:7", "127.0.0.2:7"]),
        (["127.0.0.1", "::1"], ["127.0.0.1:7"]),
        (["::1", "fd00::2"], ["[::1]:7", "[fd00::2]:7"]),
    ],
)
async def test_a_name_with_addresses_of_both_families_stands_for_each_host_once(hosts, expected, monkeypatch):
    async def getaddrinfo(_: str, port: int, **__: object) -> list[tuple]:
        families = [socket.AF_INET6 if ":" in host else socket.AF_INET for host in hosts]
        return [(family, 0, 0, "", (host, port)) for family, host in zip(families, hosts, strict=True)]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert await replicas._addresses("action.internal", 7) == expected


@pytest.mark.parametrize("address", ["a..b:1", f"{'x' * 64}.internal:1"])
async def test_an_address_that_is_no_host_name_is_named(address, tmp_path):
    settings = make_settings(tmp_path)
    with pytest.raises(SettingsError, match=re.escape(f"gateway.action.address: {address!r}: ")):
        ActionBackend(settings.gateway, f"127.0.0.1:1,{address}")


async def test_a_name_that_stands_for_nothing_is_named(tmp_path):
    async with running_backend(tmp_path, "action.invalid:50052", ready=0) as backend:
        await until(lambda: "cannot be resolved" in backend.not_ready_reason, "the name to be asked for")
        with pytest.raises(UnavailableError, match=r"the action service's address action\.invalid cannot be resolved"):
            await infer(backend)


async def test_a_session_is_reset_at_every_replica(services, tmp_path):
    async with running_backend(tmp_path, addresses(services), ready=2) as backend:
        body = inference_pb2.ResetRequest(session_id="left arm").SerializeToString()
        await backend.reset(body, time.monotonic() + 10)
        assert [service.resets for service in services] == [["left arm"], ["left arm"]]
