"""The operators' HTTP: health, configuration at every replica, refusals, token, and the page."""

import asyncio
import contextlib
import http.client
import json
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openpi_flash_common.settings import SettingsError

from openpi_flash_gateway.conftest import FakePlannerService, make_settings, running_gateway
from openpi_flash_gateway.gateway import Gateway


@pytest.fixture
async def planners() -> AsyncIterator[list[FakePlannerService]]:
    services = [FakePlannerService(), FakePlannerService()]
    for service in services:
        await service.start()
    yield services
    for service in services:
        await service.stop()


@contextlib.asynccontextmanager
async def combined(
    tmp_path: Path, action_port: int | None, planners: list[FakePlannerService], **gateway: Any
) -> AsyncIterator[Gateway]:
    ports = [planner.port for planner in planners]
    async with running_gateway(make_settings(tmp_path, action_port, planner_ports=ports, **gateway)) as running:
        await asyncio.wait_for(running.endpoint.wait_ready(), 10)
        while running.planner is not None and any(r.not_ready_reason for r in running.planner.replicas):
            await asyncio.sleep(0.02)
        yield running


async def call(gateway: Gateway, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
    def send() -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{gateway.admin.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}),
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
                status, data = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, data = error.code, error.read()
        try:
            return status, json.loads(data)
        except ValueError:
            return status, data.decode(errors="replace")

    return await asyncio.to_thread(send)


async def test_health(tmp_path, action_service, planners):
    async with combined(tmp_path, action_service.port, planners) as gateway:
        status, health = await call(gateway, "GET", "/health")
        assert (status, health["status"], health["mode"]) == (200, "ok", "combined")
        assert [replica["ready"] for replica in health["slots"]["planner"]["replicas"]] == [True, True]
        for planner in planners:
            await planner.stop()
        while (answer := await call(gateway, "GET", "/health"))[1]["status"] == "ok":
            pass
        status, health = answer
        assert (status, health["status"], health["slots"]["planner"]["ready"]) == (200, "degraded", False)
        assert "out of reach" in health["slots"]["planner"]["reason"]
        await action_service.stop()
        while (answer := await call(gateway, "GET", "/health"))[0] == 200:
            pass
        assert (answer[0], answer[1]["status"]) == (503, "unavailable")


async def test_a_change_reaches_every_replica_and_the_reply_says_which_took_it(tmp_path, action_service, planners):
    async with combined(tmp_path, action_service.port, planners) as gateway:
        change = {"max_generation_tokens": 7, "action_prompt_template": "{subtask} ({task})", "cadence": "background"}
        status, reply = await call(gateway, "PATCH", "/config", change)
        assert (status, reply["cadence"]) == (200, "background")
        addresses = {f"127.0.0.1:{planner.port}" for planner in planners}
        assert {replica["address"] for replica in reply["replicas"]} == addresses
        for replica in reply["replicas"]:
            assert (replica["error"], replica["config"]["max_generation_tokens"]) == ("", 7)
        assert [planner.config.max_generation_tokens for planner in planners] == [7, 7]
        assert await call(gateway, "GET", "/config") == (200, reply)
        status, reply = await call(gateway, "PATCH", "/config", {"cadence": {"interval_ms": 250}})
        assert (status, reply["cadence"]) == (200, {"interval_ms": 250})


async def test_a_replica_that_was_away_takes_the_change_when_it_returns(tmp_path, action_service, planners):
    async with combined(tmp_path, action_service.port, planners) as gateway:
        await planners[1].stop()
        status, reply = await call(gateway, "PATCH", "/config", {"top_k": 5})
        errors = {replica["address"]: replica["error"] for replica in reply["replicas"]}
        assert status == 200
        assert errors[f"127.0.0.1:{planners[0].port}"] == ""
        assert errors[f"127.0.0.1:{planners[1].port}"].startswith("UNAVAILABLE: ")
        assert [planner.config.top_k for planner in planners] == [5, 0]
        await planners[1].start()
        while planners[1].config.top_k != 5:
            await asyncio.sleep(0.02)
        await planners[0].stop()
        await planners[1].stop()
        status, reply = await call(gateway, "PATCH", "/config", {"top_k": 6})
        assert (status, "no planner took the change" in reply["detail"]) == (503, True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"max_tokens": 7}, "max_tokens"),
        ({"max_generation_tokens": 0}, "max_generation_tokens"),
        ({"max_generation_tokens": None}, "max_generation_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"generation_prompt_format": "Task: "}, "generation_prompt_format"),
        ({"action_prompt_template": "{task} {subtask} {more}"}, "action_prompt_template"),
        ({"cadence": "sometimes"}, "cadence"),
        ({"cadence": {"interval_ms": 0}}, "interval_ms"),
        ({"top_k": 13}, "top_k: 13 is unlucky"),
        ([], "dictionary"),
    ],
)
async def test_a_change_that_cannot_be_changes_nothing(tmp_path, action_service, planners, change, problem):
    async with combined(tmp_path, action_service.port, planners) as gateway:
        before = await call(gateway, "GET", "/config")
        body = {"cadence": "background", **change} if isinstance(change, dict) else change
        status, reply = await call(gateway, "PATCH", "/config", body)
        assert status == 422
        assert problem in json.dumps(reply)
        assert await call(gateway, "GET", "/config") == before


async def test_a_token_is_asked_for_where_one_is_configured(tmp_path, action_service, planners):
    async with combined(tmp_path, action_service.port, planners, admin={"port": 0, "token": "sesame"}) as gateway:
        for token in ("", "wrong"):
            for method, body in (("GET", None), ("PATCH", {"top_k": 1})):
                assert (await call(gateway, method, "/config", body, token))[0] == 401
        assert (await call(gateway, "PATCH", "/config", {"top_k": 1}, "sesame"))[0] == 200
        assert (await call(gateway, "GET", "/health"))[0] == 200
    assert [planner.config.top_k for planner in planners] == [1, 1]


async def test_a_page_of_elsewhere_gets_nowhere(tmp_path, action_service):
    def ask(port: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/health", headers={"Host": f"rebound.example:{port}"})
            return connection.getresponse().status

    async with combined(tmp_path, action_service.port, []) as gateway:
        assert await asyncio.to_thread(ask, gateway.admin.port) == 400


async def test_without_a_planner_there_is_nothing_to_change(tmp_path, action_service):
    async with combined(tmp_path, action_service.port, []) as gateway:
        assert (await call(gateway, "GET", "/health"))[1]["slots"].keys() == {"action"}
        for method, body in (("GET", None), ("PATCH", {"top_k": 1})):
            status, reply = await call(gateway, method, "/config", body)
            assert (status, "no planner" in reply["detail"]) == (404, True)


async def test_without_an_action_policy_there_is_no_cadence(tmp_path, planners):
    async with combined(tmp_path, None, planners) as gateway:
        assert (await call(gateway, "PATCH", "/config", {"cadence": "background"}))[0] == 422
        assert (await call(gateway, "GET", "/config"))[1]["cadence"] is None


async def test_the_page_needs_nothing_from_elsewhere(tmp_path, action_service, planners):
    async with combined(tmp_path, action_service.port, planners) as gateway:
        status, page = await call(gateway, "GET", "/docs")
        assert status == 200
        for path in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
            assert f'"/static-offline-docs/{path}"' in page
            assert (await call(gateway, "GET", f"/static-offline-docs/{path}"))[0] == 200
        schema = (await call(gateway, "GET", "/openapi.json"))[1]
        assert schema["paths"].keys() == {"/health", "/config"}


async def test_a_port_that_is_taken(tmp_path, action_service):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = make_settings(tmp_path, action_service.port, admin={"port": taken.getsockname()[1]})
        with pytest.raises(SettingsError, match=r"gateway\.admin\.port: cannot listen on"):
            async with running_gateway(settings):
                pass


async def test_none_when_it_is_switched_off(tmp_path, action_service):
    async with running_gateway(make_settings(tmp_path, action_service.port, admin=None)) as gateway:
        assert gateway.admin is None
