"""ActionService over gRPC, around a real policy whose model is plain arithmetic."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from openpi_flash.v1 import action_pb2_grpc, inference_pb2, types_pb2
from openpi_flash_common.codec import tensor_from_proto, tensor_to_proto
from openpi_flash_common.errors import from_rpc_error
from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.scheduler import Scheduler
from openpi_flash_common.settings import TelemetrySettings
from openpi_flash_common.telemetry import Telemetry, setup
from openpi_flash_common.telemetry_test import CALLER, TRACE_ID, Collector, scrape
from openpi_flash_models.normalize import NormStats
from openpi_flash_models.policy import Policy
from openpi_flash_models.policy_configs import load_policy_config
from openpi_flash_models.request import ModelBatch
from openpi_flash_models.tokenizer import PromptTokenizer

from openpi_flash_action.service import SERVICE, ActionServicer

TOKENIZER = PromptTokenizer(Path(__file__).parents[3] / "tests/data/golden/tokenizer/tiny_visible.model")
HIGH, WRIST = "images/cam_high", "images/cam_left_wrist"
RNG = np.random.default_rng(3)
PICTURES = {path: RNG.integers(0, 256, (224, 224, 3), np.uint8) for path in (HIGH, WRIST)}
STATE = RNG.uniform(-1, 1, 14)


class ArithmeticBackend:
    """Actions from the noise and the sum of every picture; waits for the gate."""

    name = "arithmetic"

    def __init__(self, config) -> None:
        self.config = config
        self.gate = threading.Event()
        self.gate.set()
        self.num_calls = 0

    def sample_actions(self, batch: ModelBatch) -> np.ndarray:
        self.num_calls += 1
        assert self.gate.wait(30)
        brightness = batch.images.mean(axis=(1, 2, 3, 4), dtype=np.float32)
        actions = (batch.noise + brightness[:, None, None]) / batch.num_steps
        return actions if batch.continuation is None else actions + batch.continuation.actions


class Service:
    """A running service, its policy, and a client's stub."""

    def __init__(self, telemetry: Telemetry) -> None:
        config = load_policy_config("pi0_aloha_sim")
        stats = NormStats(mean=np.zeros(14), std=np.ones(14), q01=None, q99=None)
        self.backend = ArithmeticBackend(config.model)
        self.policy = Policy(
            config,
            self.backend,
            TOKENIZER,
            {"state": stats, "actions": stats},
            max_batch_size=2,
            real_time_chunking=True,
        )
        self.scheduler = Scheduler(4, telemetry)
        self.servicer = ActionServicer(self.scheduler, telemetry)
        self.server = self.servicer.server = GrpcServer(
            {SERVICE: self.servicer.register}, ["127.0.0.1:0"], telemetry, max_message_bytes=4 << 20
        )
        self.stub: action_pb2_grpc.ActionServiceStub

    async def until_running(self, calls: int) -> None:
        async with asyncio.timeout(20):
            while self.backend.num_calls < calls:
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def serving(telemetry: Telemetry, *, ready: bool = True) -> AsyncIterator[Service]:
    service = Service(telemetry)
    await service.server.start()
    running = asyncio.ensure_future(service.server.run_until_stopped())
    if ready:
        service.servicer.model = service.policy
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.server.ports[0]}") as channel:
            service.stub = action_pb2_grpc.ActionServiceStub(channel)
            yield service
    finally:
        service.backend.gate.set()
        service.server.stop()
        await running
        service.scheduler.close()


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving(Telemetry()) as service:
        yield service


def make_request(**changes) -> inference_pb2.InferRequest:
    request = inference_pb2.InferRequest(**{"seed": 7, **changes})
    for path, pixels in PICTURES.items():
        request.observation.images[path].CopyFrom(
            types_pb2.Image(encoding=types_pb2.IMAGE_ENCODING_RAW, height=224, width=224, data=pixels.tobytes())
        )
    request.observation.tensors["state"].CopyFrom(tensor_to_proto(STATE))
    request.observation.prompt = "transfer the cube"
    return request


def direct(policy: Policy, **options) -> np.ndarray:
    """What openpi's own arrangement would give: ALOHA's pictures are channels first."""
    pictures = {path: pixels.transpose(2, 0, 1) for path, pixels in PICTURES.items()}
    return policy.infer({**pictures, "state": STATE}, prompt="transfer the cube", **options)["actions"]


def actions_of(response: inference_pb2.InferResponse) -> np.ndarray:
    return tensor_from_proto(response.tensors["actions"], "actions")


async def stream_call(service: Service, *requests: inference_pb2.InferStreamRequest):
    call = service.stub.InferStream(iter(requests), timeout=20)
    return [answer async for answer in call]


async def test_unary_and_stream_give_the_bytes_of_a_direct_call(service):
    expected = direct(service.policy, seed=7)
    response = await service.stub.Infer(make_request(), timeout=20)
    assert actions_of(response).dtype == np.float64
    assert actions_of(response).tobytes() == expected.tobytes()

    (answer,) = await stream_call(service, inference_pb2.InferStreamRequest(request_id=5, request=make_request()))
    assert answer.request_id == 5
    assert actions_of(answer.response).tobytes() == expected.tobytes()

    timing = response.timing
    parts = timing.queue_ms + timing.preprocess_ms + timing.model_ms + timing.postprocess_ms
    assert 0 < parts <= timing.total_ms
    assert timing.batch_size == 1
    assert timing.planner_ms == 0
    assert not response.HasField("subtask")


async def test_options_reach_the_policy(service):
    noise = RNG.standard_normal((50, 32)).astype(np.float32)
    request = make_request(num_steps=4, mode=inference_pb2.MODE_ACTION_ONLY, noise=tensor_to_proto(noise))
    request.ClearField("seed")
    response = await service.stub.Infer(request, timeout=20)
    expected = direct(service.policy, noise=noise, num_steps=4)
    assert actions_of(response).tobytes() == expected.tobytes()
    assert (actions_of(response) != direct(service.policy, noise=noise)).any()


async def test_a_chunk_may_continue_the_one_before(service):
    chunk = direct(service.policy, seed=1)
    numbers = {"inference_delay": 0, "execution_horizon": 4}
    response = await service.stub.Infer(make_request(previous_actions=tensor_to_proto(chunk), **numbers), timeout=20)
    expected = direct(service.policy, seed=7, previous_actions=chunk, **numbers)
    assert actions_of(response).tobytes() == expected.tobytes()
    assert (actions_of(response) != direct(service.policy, seed=7)).any()


async def test_pictures_as_tensors_are_taken_as_the_robot_documents_them(service):
    request = make_request()
    request.observation.images.clear()
    for path, pixels in PICTURES.items():
        request.observation.tensors[path].CopyFrom(tensor_to_proto(pixels.transpose(2, 0, 1)))
    response = await service.stub.Infer(request, timeout=20)
    assert actions_of(response).tobytes() == direct(service.policy, seed=7).tobytes()


async def test_default_prompt_and_fresh_noise(service):
    request = make_request()
    request.observation.ClearField("prompt")
    request.ClearField("seed")
    first, second = [actions_of(await service.stub.Infer(request, timeout=20)) for _ in range(2)]
    assert (first != second).any()


async def test_metadata_says_what_is_served(service):
    metadata = MessageToDict(
        await service.stub.GetMetadata(inference_pb2.GetMetadataRequest(), timeout=20), preserving_proto_field_name=True
    )
    assert metadata.pop("server_version")
    image = {"height": 224, "width": 224, "layout": "IMAGE_LAYOUT_CHW", "dtype": "DTYPE_UINT8"}
    image["encoding"] = "IMAGE_ENCODING_RAW"
    assert metadata == {
        "policy_metadata": {},
        "model_config_name": "pi0_aloha_sim",
        "model_type": "pi0",
        "backend": "arithmetic",
        "action_horizon": 50,
        "action_dim": 32,
        "robot_action_dim": 14,
        "default_num_steps": 10,
        "default_prompt": "Transfer cube",
        "real_time_chunking": "guided",
        "image_specs": [
            {"path": HIGH, "required": True, **image},
            {"path": WRIST, **image},
            {"path": "images/cam_right_wrist", **image},
        ],
        "tensor_specs": [{"path": "state", "shape": [14], "dtype": "DTYPE_FLOAT64", "required": True}],
    }


def bad_requests() -> dict[str, tuple[inference_pb2.InferRequest, str, str]]:
    """By name: a request, the field that is at fault, and part of what is said about it."""
    cases = {}

    def add(name: str, field: str, message: str, **changes) -> inference_pb2.InferRequest:
        request = make_request(**changes)
        cases[name] = (request, field, message)
        return request

    add("unknown mode", "mode", "77 is not one of", mode=77)
    add("too many steps", "num_steps", "1 to 100", num_steps=101)
    add("seed and noise", "noise", "exclude each other", noise=tensor_to_proto(np.zeros((50, 32), np.float32)))
    noise = add("noise of another shape", "noise", r"\(50, 32\)", noise=tensor_to_proto(np.zeros((50, 14), np.float32)))
    noise.ClearField("seed")
    noise = add("noise that lies", "noise", "exactly 8", noise=types_pb2.Tensor(dtype=13, shape=[1], data=b"1"))
    noise.ClearField("seed")
    del add("missing camera", HIGH, "missing").observation.images[HIGH]
    del add("missing state", "state", "missing").observation.tensors["state"]
    unknown = add("unknown entry", "stat", "unknown").observation
    unknown.tensors["stat"].CopyFrom(tensor_to_proto(STATE))
    add("short picture", HIGH, "150527 bytes").observation.images[HIGH].data = PICTURES[HIGH].tobytes()[:-1]
    jpeg = add("jpeg that is none", HIGH, "do not decode as JPEG").observation.images[HIGH]
    jpeg.encoding = types_pb2.IMAGE_ENCODING_JPEG
    chunk = tensor_to_proto(np.zeros((50, 14)))
    continued = {"previous_actions": chunk, "inference_delay": 5, "execution_horizon": 10}
    add("a delay past the horizon", "inference_delay", "from 0 to 10", **{**continued, "inference_delay": 11})
    add("a delay alone", "inference_delay", "without previous_actions", inference_delay=0)
    add("no delay", "inference_delay", "got None", previous_actions=chunk, execution_horizon=10)
    short = {**continued, "previous_actions": tensor_to_proto(np.zeros((49, 14)))}
    add("another horizon", "previous_actions", r"\(50, 14\), got \(49, 14\)", **short)
    nan = {**continued, "previous_actions": tensor_to_proto(np.full((50, 14), np.nan))}
    add("a chunk with NaN", "previous_actions", "finite", **nan)
    lies = {**continued, "previous_actions": types_pb2.Tensor(dtype=13, shape=[1], data=b"1")}
    add("a chunk that lies", "previous_actions", "exactly 8", **lies)
    for name, state, message in (
        ("state of another length", np.zeros(13), "14"),
        ("state with NaN", np.full(14, np.nan), "NaN|finite"),
        ("state of another kind", np.zeros(14, bool), "bool"),
    ):
        add(name, "state", message).observation.tensors["state"].CopyFrom(tensor_to_proto(state))
    return cases


@pytest.mark.parametrize("name", bad_requests())
async def test_bad_input_is_refused_by_name_and_the_service_goes_on(service, name):
    request, field, message = bad_requests()[name]
    with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
        await service.stub.Infer(request, timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(caught.value).field == field

    bad, good = await stream_call(
        service,
        inference_pb2.InferStreamRequest(request_id=1, request=request),
        inference_pb2.InferStreamRequest(request_id=2, request=make_request()),
    )
    assert (bad.request_id, bad.error.code, bad.error.field) == (1, 3, field)
    assert good.response.tensors["actions"].shape == [50, 14]
    assert service.backend.num_calls == 1


async def test_the_planners_mode_is_refused(service):
    with pytest.raises(grpc.aio.AioRpcError, match="subtask_only needs a planner") as caught:
        await service.stub.Infer(make_request(mode=inference_pb2.MODE_SUBTASK_ONLY), timeout=20)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_session_to_forget_has_a_name(service):
    await service.stub.Reset(inference_pb2.ResetRequest(session_id="robot-1"), timeout=20)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.stub.Reset(inference_pb2.ResetRequest(), timeout=20)
    assert from_rpc_error(caught.value).field == "session_id"


async def test_before_it_is_ready_everything_is_unavailable():
    async with serving(Telemetry(), ready=False) as service:
        calls = (service.stub.Infer(make_request()), service.stub.GetMetadata(inference_pb2.GetMetadataRequest()))
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError, match="loaded and warmed up") as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        request = inference_pb2.InferStreamRequest(request_id=1, request=make_request())
        (refused,) = await stream_call(service, request)
        assert refused.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
        service.servicer.model = service.policy
        (answer,) = await stream_call(service, request)
        assert answer.HasField("response")


async def test_a_streams_deadline_ends_the_request_and_not_the_stream(service):
    service.backend.gate.clear()
    call = service.stub.InferStream(timeout=20)
    await call.write(inference_pb2.InferStreamRequest(request_id=1, timeout_ms=20, request=make_request()))
    late = await call.read()
    assert (late.request_id, late.error.code) == (1, grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    service.backend.gate.set()
    await call.write(inference_pb2.InferStreamRequest(request_id=2, request=make_request()))
    assert (await call.read()).response.timing.batch_size == 1


async def test_a_call_that_is_given_up_never_reaches_the_accelerator(service):
    service.backend.gate.clear()
    first = asyncio.ensure_future(service.stub.Infer(make_request(), timeout=20))
    await service.until_running(1)
    cancelled = service.stub.InferStream()
    await cancelled.write(inference_pb2.InferStreamRequest(request_id=1, request=make_request()))
    with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
        await service.stub.Infer(make_request(), timeout=0.3)
    cancelled.cancel()
    async with asyncio.timeout(20):
        while service.scheduler._waiting or service.scheduler._num_queued:
            await asyncio.sleep(0.001)
    service.backend.gate.set()
    await first
    await service.stub.Infer(make_request(), timeout=20)
    assert service.backend.num_calls == 2


async def test_neighbours_of_bad_requests_lose_nothing(service):
    """More robots than the queue holds, every other one sends rubbish; the rest are answered or told to come back."""
    expected = direct(service.policy, seed=7).tobytes()
    rubbish = [request for request, _, _ in bad_requests().values()]

    async def robot(number: int) -> int:
        answered = 0
        call = service.stub.InferStream(timeout=60)
        for round_number in range(20):
            is_bad = number % 2
            request = rubbish[round_number % len(rubbish)] if is_bad else make_request()
            await call.write(inference_pb2.InferStreamRequest(request_id=round_number, request=request))
            answer = await call.read()
            assert answer.request_id == round_number
            if is_bad:
                assert answer.error.code in (3, 8)
            elif answer.HasField("response"):
                assert actions_of(answer.response).tobytes() == expected
                answered += 1
            else:
                assert answer.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        return answered

    answered = await asyncio.gather(*(robot(number) for number in range(10)))
    assert sum(answered) > 0
    assert service.scheduler._num_queued == 0


async def test_a_trace_leads_to_the_model_and_metrics_tell_the_rest():
    collector = Collector()
    settings = TelemetrySettings(otlp_endpoint=collector.endpoint, metrics=True, action_metrics_port=0)
    telemetry = setup(settings, "action")
    async with serving(telemetry) as service:
        stream_request = inference_pb2.InferStreamRequest(
            request_id=1, request=make_request(), traceparent=CALLER.traceparent, tracestate=CALLER.tracestate
        )
        await stream_call(service, stream_request)
        await service.stub.Infer(make_request(), timeout=20, metadata=CALLER.to_metadata())
        samples = await asyncio.to_thread(scrape, telemetry)
    await asyncio.to_thread(telemetry.shutdown)
    collector.stop()

    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    parents = {span.span_id: span.name for span in collector.spans}
    below = {(parents.get(span.parent_span_id, "robot"), span.name) for span in collector.spans}
    for method in ("ActionService/Infer", "ActionService/InferStream"):
        assert {("robot", method), (method, "prepare"), (method, "model")} <= below
    assert samples["openpi_flash_requests_total", "OK", "ActionService/InferStream"] == 1
    assert samples["openpi_flash_received_bytes_total", "ActionService/InferStream"] == stream_request.ByteSize()
    assert samples["openpi_flash_batch_size_sum",] == 2
    assert samples["openpi_flash_model_seconds_count",] == 2
    assert samples["openpi_flash_queue_depth",] == 0
