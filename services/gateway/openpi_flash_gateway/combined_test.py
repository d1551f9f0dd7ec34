"""Combined and planner-only gateways as robots meet them: modes, subtasks, and a planner that fails."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openpi_flash.v1 import inference_pb2, policy_pb2_grpc, types_pb2
from openpi_flash_common import openpi_msgpack
from openpi_flash_common.codec import tensor_to_proto
from websockets.asyncio.client import connect

from openpi_flash_gateway.conftest import FakePlannerService, ask, make_settings, running_gateway
from openpi_flash_gateway.gateway import Gateway

PIXELS = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)


def request_for(prompt: str | None = "go", **fields: Any) -> inference_pb2.InferRequest:
    request = inference_pb2.InferRequest(**fields)
    if prompt is not None:
        request.observation.prompt = prompt
    request.observation.tensors["state"].CopyFrom(tensor_to_proto(np.arange(3.0)))
    picture = types_pb2.Image(encoding=types_pb2.IMAGE_ENCODING_RAW, height=2, width=2, data=PIXELS.tobytes())
    request.observation.images["images/cam_high"].CopyFrom(picture)
    return request


@pytest.fixture
def planner_settings() -> dict[str, Any]:
    """Fields of the `planner` section; a test parametrizes it."""
    return {}


@pytest.fixture
async def combined(action_service, planner_service, planner_settings, tmp_path: Path) -> AsyncIterator[Gateway]:
    settings = make_settings(
        tmp_path, action_service.port, planner_ports=[planner_service.port], planner=planner_settings
    )
    async with running_gateway(settings) as gateway:
        await asyncio.wait_for(gateway.endpoint.wait_ready(), 10)
        yield gateway


@pytest.fixture
async def stub(combined: Gateway) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{combined.server.ports[0]}") as channel:
        yield policy_pb2_grpc.PolicyServiceStub(channel)


def dial(gateway: Gateway, slot: str) -> Any:
    return connect(f"ws://127.0.0.1:{gateway.websocket_ports[slot]}", compression=None)


async def test_an_action_is_conditioned_on_the_subtask(stub, action_service, planner_service):
    response = await stub.Infer(request_for(seed=7, session_id="robot"), timeout=10)
    assert response.tensors["actions"].shape == [2, 3]
    assert (response.subtask.text, response.subtask.ms) == ("step 1", 3.5)
    assert response.subtask.status == inference_pb2.SUBTASK_STATUS_FRESH
    assert response.timing.model_ms == 12.5
    assert 0 < response.timing.planner_ms < response.timing.total_ms
    asked = planner_service.received[0]
    assert (asked.session_id, asked.seed, asked.observation) == ("robot", 7, request_for().observation)
    received = action_service.received[0].request
    assert received == request_for("go. Subtask: step 1", seed=7, session_id="robot")


async def test_the_actions_default_prompt_is_the_planners_task(action_service, planner_service, tmp_path):
    action_service.metadata.default_prompt = "tidy up"
    settings = make_settings(tmp_path, action_service.port, planner_ports=[planner_service.port])
    async with (
        running_gateway(settings) as gateway,
        grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server.ports[0]}") as channel,
    ):
        await asyncio.wait_for(gateway.endpoint.wait_ready(), 10)
        await policy_pb2_grpc.PolicyServiceStub(channel).Infer(request_for(None), timeout=10)
    assert action_service.prompts == ["tidy up. Subtask: step 1"]
    assert planner_service.received[0].observation == request_for("tidy up").observation


async def test_modes(stub, action_service, planner_service):
    alone = await stub.Infer(request_for(mode=inference_pb2.MODE_ACTION_ONLY), timeout=10)
    assert not alone.HasField("subtask")
    assert action_service.prompts == ["go"]
    assert not planner_service.received
    subtask = await stub.Infer(request_for(mode=inference_pb2.MODE_SUBTASK_ONLY), timeout=10)
    assert (subtask.subtask.text, len(subtask.tensors), len(action_service.received)) == ("step 1", 0, 1)
    with pytest.raises(grpc.aio.AioRpcError, match="mode: 9 is not one of") as caught:
        await stub.Infer(request_for(mode=9), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("task", "error"),
    [
        ("broken", "INTERNAL: the planner is broken"),
        ("nothing", "INTERNAL: the planner wrote nothing"),
        ("cancelled", r"UNAVAILABLE: the planner at 127\.0\.0\.1:\d+ cancelled the call"),
    ],
)
async def test_a_planner_that_fails_costs_the_action_its_subtask_alone(stub, action_service, task, error):
    response = await stub.Infer(request_for(task), timeout=10)
    assert response.tensors["actions"].shape == [2, 3]
    assert response.subtask.status == inference_pb2.SUBTASK_STATUS_FAILED
    assert re.fullmatch(error, response.subtask.error)
    assert action_service.prompts == [task]


async def test_alone_a_planner_that_fails_is_an_error(stub):
    with pytest.raises(grpc.aio.AioRpcError, match="the planner is broken") as caught:
        await stub.Infer(request_for("broken", mode=inference_pb2.MODE_SUBTASK_ONLY), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_a_subtask_leaves_the_action_time_enough(stub, planner_service):
    planner_service.hold.clear()
    response = await stub.Infer(request_for(), timeout=1.5)
    assert response.tensors["actions"].shape == [2, 3]
    assert response.subtask.status == inference_pb2.SUBTASK_STATUS_FAILED


async def test_a_planner_that_goes_away_and_comes_back(stub, combined, planner_service):
    planner_service.hold.clear()
    asking = asyncio.ensure_future(stub.Infer(request_for(), timeout=20))
    while not planner_service.received:
        await asyncio.sleep(0.01)
    await planner_service.stop()
    response = await asking
    assert response.tensors["actions"].shape == [2, 3]
    assert response.subtask.status == inference_pb2.SUBTASK_STATUS_FAILED
    assert (await stub.Infer(request_for(), timeout=10)).subtask.status == inference_pb2.SUBTASK_STATUS_FAILED
    assert not combined.endpoint.not_ready_reason
    planner_service.hold.set()
    await planner_service.start()
    while (await stub.Infer(request_for(), timeout=10)).subtask.status != inference_pb2.SUBTASK_STATUS_FRESH:
        await asyncio.sleep(0.05)


async def test_the_gateway_waits_for_the_planners_first_time_and_not_for_ever(
    action_service, planner_service, tmp_path, caplog
):
    await planner_service.stop()
    port = planner_service.port
    settings = make_settings(tmp_path, action_service.port, planner_ports=[port], planner_start_timeout_ms=300_000)
    async with running_gateway(settings) as gateway:
        while "planner at" not in gateway.endpoint.not_ready_reason:
            await asyncio.sleep(0.02)
        assert not gateway.endpoint.is_ready
        await planner_service.start()
        await asyncio.wait_for(gateway.endpoint.wait_ready(), 10)
    await planner_service.stop()
    settings = make_settings(tmp_path, action_service.port, planner_ports=[port], planner_start_timeout_ms=100)
    async with running_gateway(settings) as gateway:
        await asyncio.wait_for(gateway.endpoint.wait_ready(), 10)


@pytest.mark.parametrize("planner_settings", [{"cadence": "background"}])
async def test_in_the_background_no_action_waits_and_a_reset_begins_anew(stub, planner_service, action_service):
    pending = await stub.Infer(request_for(session_id="robot"), timeout=10)
    assert pending.subtask.status == inference_pb2.SUBTASK_STATUS_PENDING
    while (answer := await stub.Infer(request_for(session_id="robot"), timeout=10)).subtask.text == "":
        await asyncio.sleep(0.01)
    assert answer.subtask.status == inference_pb2.SUBTASK_STATUS_REUSED
    assert action_service.prompts[-1] == f"go. Subtask: {answer.subtask.text}"
    planner_service.hold.clear()
    await stub.Reset(inference_pb2.ResetRequest(session_id="robot"), timeout=10)
    assert action_service.resets == ["robot"]
    answer = await stub.Infer(request_for(session_id="robot"), timeout=10)
    assert answer.subtask.status == inference_pb2.SUBTASK_STATUS_PENDING


@pytest.mark.parametrize("planner_settings", [{"cadence": {"interval_ms": 100_000}}])
async def test_a_websocket_and_a_stream_are_sessions(stub, combined, planner_service):
    async with dial(combined, "action") as one, dial(combined, "action") as other:
        for connection in (one, other):
            await connection.recv()
            assert (await ask(connection, prompt="go"))["subtask"]["status"] == "fresh"
        reused = (await ask(one, prompt="go"))["subtask"]
        assert (reused["status"], reused["text"], reused["ms"]) == ("reused", "step 1", 3.5)
        assert reused["age_ms"] > 0
        assert (await ask(one, prompt="go", reset=True))["subtask"]["text"] == "step 3"
        assert (await ask(one, prompt="stop"))["subtask"]["text"] == "step 4"
        assert (await ask(one, prompt="stop", session_id="x"))["subtask"]["text"] == "step 5"
    stream = stub.InferStream()
    statuses = []
    for _ in range(2):
        await stream.write(inference_pb2.InferStreamRequest(request=request_for()))
        statuses.append((await stream.read()).response.subtask.status)
    assert statuses == [inference_pb2.SUBTASK_STATUS_FRESH, inference_pb2.SUBTASK_STATUS_REUSED]


async def test_modes_and_the_planners_own_port_over_websockets(combined, action_service):
    async with dial(combined, "action") as connection:
        await connection.recv()
        answer = await ask(connection, prompt="go")
        assert list(answer) == ["actions", "policy_timing", "subtask", "server_timing"]
        assert answer["subtask"] == {"text": "step 1", "ms": 3.5, "status": "fresh"}
        assert "actions" not in await ask(connection, prompt="go", mode="subtask_only")
        assert "subtask" not in await ask(connection, prompt="go", mode="action_only")
        failed = await ask(connection, prompt="broken")
        assert failed["subtask"]["status"] == "failed"
        assert failed["subtask"]["error"] == "INTERNAL: the planner is broken"
        assert "actions" in failed
    num_actions = len(action_service.received)
    async with dial(combined, "planner") as connection:
        await connection.recv()
        for fields in ({}, {"mode": "default"}, {"mode": "subtask_only"}):
            answer = await ask(connection, prompt="go", **fields)
            assert list(answer) == ["policy_timing", "subtask", "server_timing"]
            assert answer["subtask"].keys() == {"text", "ms", "status"}
        assert "FAILED_PRECONDITION: mode: action_only" in await ask(connection, prompt="go", mode="action_only")
    assert len(action_service.received) == num_actions


async def test_what_it_says_of_itself(stub, combined, tmp_path):
    metadata = await stub.GetMetadata(inference_pb2.GetMetadataRequest(), timeout=10)
    assert (metadata.server_mode, metadata.planner_model_config_name) == ("combined", "fake_planner")
    assert metadata.model_config_name == "fake"
    async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'planner.sock'}") as channel:
        own = policy_pb2_grpc.PolicyServiceStub(channel)
        metadata = await own.GetMetadata(inference_pb2.GetMetadataRequest(), timeout=10)
        assert (metadata.model_config_name, metadata.planner_model_config_name) == ("", "fake_planner")
        assert [spec.path for spec in metadata.image_specs] == ["images/cam_high"]
        assert (await own.Infer(request_for(), timeout=10)).subtask.text == "step 1"


async def test_a_gateway_with_a_planner_alone(planner_service, tmp_path):
    async with running_gateway(make_settings(tmp_path, planner_ports=[planner_service.port])) as gateway:
        await asyncio.wait_for(gateway.endpoint.wait_ready(), 10)
        assert gateway.websocket_ports.keys() == {"planner"}
        async with dial(gateway, "planner") as connection:
            assert openpi_msgpack.unpackb(await connection.recv()) == {}
            assert (await ask(connection, prompt="go"))["subtask"]["text"] == "step 1"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server.ports[0]}") as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            stub = policy_pb2_grpc.PolicyServiceStub(channel)
            assert (await stub.Infer(request_for(), timeout=10)).subtask.text == "step 2"
            await stub.Reset(inference_pb2.ResetRequest(session_id="robot"), timeout=10)
            with pytest.raises(grpc.aio.AioRpcError, match="action_only needs an action policy") as caught:
                await stub.Infer(request_for(mode=inference_pb2.MODE_ACTION_ONLY), timeout=10)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            await planner_service.stop()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Infer(request_for(), timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_replicas_share_the_work_and_stand_in_for_each_other(action_service, tmp_path):
    planners = [FakePlannerService(), FakePlannerService()]
    for planner in planners:
        await planner.start()
        planner.hold.clear()
    settings = make_settings(tmp_path, action_service.port, planner_ports=[planner.port for planner in planners])
    async with (
        running_gateway(settings) as gateway,
        grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server.ports[0]}") as channel,
    ):
        await asyncio.wait_for(gateway.endpoint.wait_ready(), 10)
        while any(replica.not_ready_reason for replica in gateway.planner.replicas):
            await asyncio.sleep(0.02)
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        asking = [asyncio.ensure_future(stub.Infer(request_for(), timeout=20)) for _ in range(2)]
        while not all(planner.received for planner in planners):
            await asyncio.sleep(0.01)
        planners[1].hold.set()
        await planners[0].stop()
        for answer in await asyncio.gather(*asking):
            assert answer.subtask.status == inference_pb2.SUBTASK_STATUS_FRESH
    await planners[1].stop()
