"""PolicyService as a robot meets it: streams and unary calls, deadlines, faults of the action service behind."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from openpi_flash.v1 import inference_pb2, policy_pb2_grpc, types_pb2
from openpi_flash_common.codec import tensor_from_proto, tensor_to_proto

from openpi_flash_gateway.conftest import ACTIONS, FakeActionService, make_settings, running_gateway
from openpi_flash_gateway.gateway import Gateway
from openpi_flash_gateway.grpc_service import SERVICE

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server.ports[0]}") as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return policy_pb2_grpc.PolicyServiceStub(channel)  # type: ignore[no-untyped-call]


def infer_request(prompt: str = "go", **fields: Any) -> inference_pb2.InferRequest:
    request = inference_pb2.InferRequest(session_id="s1", **fields)
    request.observation.prompt = prompt
    request.observation.tensors["state"].CopyFrom(tensor_to_proto(np.arange(3.0)))
    return request


async def ask(call: Any, request: inference_pb2.InferRequest, **envelope: Any) -> inference_pb2.InferStreamResponse:
    await call.write(inference_pb2.InferStreamRequest(request=request, **envelope))
    return await asyncio.wait_for(call.read(), 10)


async def test_a_stream_answers_in_order_and_passes_requests_on_untouched(stub, action_service):
    call = stub.InferStream()
    for seed in range(3):
        answer = await ask(call, infer_request(seed=seed), request_id=seed + 7, timeout_ms=5000)
        assert answer.request_id == seed + 7
        np.testing.assert_array_equal(tensor_from_proto(answer.response.tensors["actions"], "actions"), ACTIONS + seed)
    assert [received.request for received in action_service.received] == [infer_request(seed=seed) for seed in range(3)]
    assert all(0 < received.timeout_ms <= 5000 for received in action_service.received)
    assert action_service.num_streams == 1
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_fields_of_a_newer_client_are_passed_on(channel, action_service):
    unknown = b"\xc2\x3e\x05later"  # field 1000, a string
    call = channel.stream_stream(f"/{SERVICE}/InferStream")()
    body = infer_request().SerializeToString() + unknown
    await call.write(unknown + b"\x2a" + bytes([len(body)]) + body)
    answer = inference_pb2.InferStreamResponse.FromString(await call.read())
    assert answer.HasField("response")
    assert action_service.received[0].request.SerializeToString().endswith(unknown)


async def test_unary_infer(stub, action_service):
    response = await stub.Infer(infer_request(seed=2), timeout=5)
    np.testing.assert_array_equal(tensor_from_proto(response.tensors["actions"], "actions"), ACTIONS + 2)
    assert response.timing.model_ms == 12.5
    assert 0 < action_service.received[0].timeout_ms < 6000  # gRPC's own deadline, on its coarser clock


async def test_trace_context_reaches_the_action_service(stub, action_service):
    await ask(stub.InferStream(), infer_request(), traceparent=TRACEPARENT, tracestate="a=b")
    await ask(stub.InferStream(metadata=(("traceparent", TRACEPARENT),)), infer_request())
    await stub.Infer(infer_request(), metadata=(("traceparent", TRACEPARENT),))
    assert [received.traceparent for received in action_service.received] == [TRACEPARENT] * 3
    assert action_service.received[0].tracestate == "a=b"


@pytest.mark.parametrize(
    ("request_", "code", "problem", "field"),
    [
        (infer_request(mode=inference_pb2.MODE_SUBTASK_ONLY), "FAILED_PRECONDITION", "no `planner` section", "mode"),
        (infer_request(mode=17), "INVALID_ARGUMENT", r"17 is not one of default .*subtask_only .*action_only", "mode"),
        (infer_request("refuse"), "INVALID_ARGUMENT", "state: not a number", "state"),
    ],
)
async def test_a_refused_request_ends_itself_and_not_the_stream(stub, request_, code, problem, field):
    call = stub.InferStream()
    answer = await ask(call, request_, request_id=5)
    assert answer.request_id == 5
    assert answer.error.code == grpc.StatusCode[code].value[0]
    assert answer.error.field == field
    with pytest.raises(grpc.aio.AioRpcError, match=problem) as caught:
        await stub.Infer(request_)
    assert caught.value.code() is grpc.StatusCode[code]
    assert (await ask(call, infer_request())).HasField("response")


async def test_bytes_that_are_no_request_are_the_clients_fault(channel, stub):
    garbage = inference_pb2.InferStreamRequest(request_id=4).SerializeToString() + b"\x2a\x02\x32\x05"
    call = channel.stream_stream(f"/{SERVICE}/InferStream")()
    await call.write(garbage)
    answer = inference_pb2.InferStreamResponse.FromString(await call.read())
    assert (answer.request_id, answer.error.code) == (4, grpc.StatusCode.INVALID_ARGUMENT.value[0])
    # Well-formed as far as the gateway reads; only the action service finds the observation broken.
    deeper = b"\x32\x04\x0a\x02\xff\xff"
    with pytest.raises(grpc.aio.AioRpcError, match="not a valid") as caught:
        await channel.unary_unary(f"/{SERVICE}/Infer")(deeper)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await stub.Infer(infer_request())).tensors


@pytest.mark.parametrize("gateway_settings", [{"max_in_flight": 2, "default_timeout_ms": 60_000}])
async def test_load_beyond_the_limit_is_refused_at_once(stub, action_service):
    slow = [asyncio.ensure_future(stub.Infer(infer_request("slow"))) for _ in range(2)]
    await action_service.wait_received(2)
    answer = await ask(stub.InferStream(), infer_request())
    assert answer.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    action_service.release.set()
    assert all(response.tensors for response in await asyncio.gather(*slow))
    assert (await stub.Infer(infer_request())).tensors
    assert action_service.num_streams == 2


async def test_a_request_out_of_time_is_dropped_by_the_action_service(stub, action_service):
    call = stub.InferStream()
    answer = await ask(call, infer_request("slow"), timeout_ms=100)
    assert answer.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    await asyncio.wait_for(action_service.cancelled.wait(), 10)
    assert (await ask(call, infer_request())).HasField("response")


@pytest.mark.parametrize("gateway_settings", [{"default_timeout_ms": 100}])
async def test_a_request_without_a_deadline_gets_the_configured_one(stub):
    answer = await ask(stub.InferStream(), infer_request("slow"))
    assert answer.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def test_a_cancelled_request_is_dropped_by_the_action_service(stub, action_service):
    call = stub.Infer(infer_request("slow"))
    await action_service.wait_received(1)
    call.cancel()
    await asyncio.wait_for(action_service.cancelled.wait(), 10)


async def test_a_broken_stream_is_replaced_once(stub, action_service):
    call = stub.InferStream()
    assert (await ask(call, infer_request("die once"))).HasField("response")
    assert len(action_service.received) == 2
    answer = await ask(call, infer_request("die"))
    assert answer.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert len(action_service.received) == 4
    assert (await ask(call, infer_request())).HasField("response")


async def test_a_restart_of_the_action_service_is_survived(stub, channel, action_service, caplog):
    caplog.set_level("INFO")
    health = health_pb2_grpc.HealthStub(channel)
    call = stub.InferStream()
    assert (await ask(call, infer_request())).HasField("response")

    async def becomes(expected: int) -> None:
        async for update in health.Watch(health_pb2.HealthCheckRequest(service=SERVICE)):
            if update.status == expected:
                return

    await asyncio.wait_for(becomes(health_pb2.HealthCheckResponse.SERVING), 10)
    await action_service.stop()
    await asyncio.wait_for(becomes(health_pb2.HealthCheckResponse.NOT_SERVING), 10)
    answer = await ask(call, infer_request())
    assert answer.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    await action_service.start()
    await asyncio.wait_for(becomes(health_pb2.HealthCheckResponse.SERVING), 20)
    assert (await ask(call, infer_request())).HasField("response")
    assert [text for text in caplog.messages if text.startswith("Service ready")] == [
        "Service ready (mode=action_only, slots=[action])"  # the first was logged before the test began
    ]


async def test_without_an_action_service_the_gateway_is_up_and_says_why_not(tmp_path: Path, unused_tcp_port: int):
    async with (
        running_gateway(make_settings(tmp_path, unused_tcp_port)) as gateway,
        grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server.ports[0]}") as channel,
    ):
        status = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert status.status == health_pb2.HealthCheckResponse.NOT_SERVING
        stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)  # type: ignore[no-untyped-call]
        for call in (stub.Infer(infer_request()), stub.GetMetadata(inference_pb2.GetMetadataRequest())):
            with pytest.raises(grpc.aio.AioRpcError, match="action service") as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("gateway_settings", [{"images": {"encoding": "jpeg", "quality": 80}}])
async def test_metadata_tells_how_the_operator_wants_pictures(stub):
    metadata = await stub.GetMetadata(inference_pb2.GetMetadataRequest())
    assert metadata.model_config_name == "fake"
    (camera,) = metadata.image_specs
    assert (camera.encoding, camera.jpeg_quality, camera.jpeg_subsampling) == (
        types_pb2.IMAGE_ENCODING_JPEG,
        80,
        "4:2:0",
    )


async def test_reset(stub, action_service: FakeActionService):
    await stub.Reset(inference_pb2.ResetRequest(session_id="s1"))
    assert action_service.resets == ["s1"]
    with pytest.raises(grpc.aio.AioRpcError, match="session_id: empty") as caught:
        await stub.Reset(inference_pb2.ResetRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("gateway_settings", [{"max_message_bytes": 1 << 16}])
async def test_an_oversized_message_is_refused(stub):
    request = infer_request()
    request.observation.tensors["big"].data = bytes(1 << 17)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Infer(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await stub.Infer(infer_request())).tensors


async def test_the_unix_socket_answers(gateway, tmp_path):
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/action.sock") as channel:
        stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)  # type: ignore[no-untyped-call]
        assert (await stub.Infer(infer_request())).tensors


async def test_reflection_describes_the_service(channel):
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
    answer = await call.read()
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(data)
        for data in answer.file_descriptor_response.file_descriptor_proto
    ]
    methods = {method.name for file in files for service in file.service for method in service.method}
    assert methods == {"Infer", "InferStream", "GetMetadata", "Reset"}


async def test_a_stop_finishes_what_runs_and_ends_idle_streams(action_service, tmp_path):
    async with running_gateway(make_settings(tmp_path, action_service.port)) as gateway:
        await gateway.endpoint.wait_ready()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server.ports[0]}") as channel:
            stub: Any = policy_pb2_grpc.PolicyServiceStub(channel)  # type: ignore[no-untyped-call]
            idle, busy = stub.InferStream(), stub.InferStream()
            await ask(idle, infer_request())
            await busy.write(inference_pb2.InferStreamRequest(request=infer_request("slow")))
            await action_service.wait_received(2)
            gateway.stop()
            with pytest.raises(grpc.aio.AioRpcError, match="stopping"):
                await asyncio.wait_for(idle.read(), 10)
            action_service.release.set()
            assert (await asyncio.wait_for(busy.read(), 10)).HasField("response")
