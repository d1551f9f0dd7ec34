"""PlannerService over gRPC, around a real planner with a small checkpoint, for ALOHA, DROID and LIBERO."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from openpi_flash.v1 import planner_pb2, planner_pb2_grpc, types_pb2
from openpi_flash_common.codec import tensor_to_proto
from openpi_flash_common.errors import from_rpc_error
from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.scheduler import Scheduler
from openpi_flash_common.settings import AuthSettings, PlannerSettings, TelemetrySettings
from openpi_flash_common.telemetry import Telemetry, setup
from openpi_flash_common.telemetry_test import CALLER, TRACE_ID, Collector, scrape
from openpi_flash_models.golden.compare import GoldenModel
from openpi_flash_models.planner.config import PI05_SUBTASK
from openpi_flash_models.planner.load import load_planner
from openpi_flash_models.planner.planner import GeneratedSubtask, GenerationOptions, Planner

from openpi_flash_planner.configuration import Configuration
from openpi_flash_planner.service import SERVICE, PlannerServicer

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"
MODEL = GoldenModel(GOLDEN / "pi05_a")
MAX_TOKENS = 24
SETTINGS = PlannerSettings(checkpoint_dir="-", max_generation_tokens=MAX_TOKENS)
BASE, WRIST = "observation/image", "observation/wrist_image"
TASKS = ("fold the towel", "open the drawer", "wipe the table", "pick up the red cup")


class GatedDecoder:
    """A planner's decoder. Notes the rows of each batch that it starts and how far each advance is to go; waits for the
    gates."""

    def __init__(self, decoder) -> None:
        self._decoder = decoder
        self.calls: list[tuple[str, int]] = []
        self.failures: list[Exception] = []
        self.start_gate, self.advance_gate = threading.Event(), threading.Event()
        self.start_gate.set()
        self.advance_gate.set()

    def start(self, batch):
        self.calls.append(("start", len(batch.images)))
        assert self.start_gate.wait(30)
        if self.failures:
            raise self.failures.pop()
        return self._decoder.start(batch)

    def advance(self, draft, until=256):
        self.calls.append(("advance", until))
        assert self.advance_gate.wait(30)
        return self._decoder.advance(draft, until)


class Service:
    """A running service, its planner, and a client's stub."""

    def __init__(self, planner: Planner, telemetry: Telemetry, auth: AuthSettings | None) -> None:
        self.planner = planner
        self.decoder = planner.decoder
        self.scheduler = Scheduler(4, telemetry)
        self.servicer = PlannerServicer(self.scheduler, Configuration(SETTINGS))
        self.server = GrpcServer({SERVICE: self.servicer.register}, ["127.0.0.1:0"], telemetry, auth=auth)
        self.stub: planner_pb2_grpc.PlannerServiceStub

    async def until(self, condition) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def loaded() -> Planner:
    config = dataclasses.replace(PI05_SUBTASK, model=MODEL.config, tokenizer=GOLDEN / "tokenizer/tiny_visible.model")
    return load_planner(config, MODEL.path / "checkpoint", device="cpu", precision="float32", max_batch_size=2)


@contextlib.asynccontextmanager
async def serving(
    planner: Planner, telemetry: Telemetry, *, ready: bool = True, auth: AuthSettings | None = None
) -> AsyncIterator[Service]:
    decoder = planner.decoder
    planner.decoder = GatedDecoder(decoder)
    service = Service(planner, telemetry, auth)
    await service.server.start()
    running = asyncio.ensure_future(service.server.run_until_stopped())
    if ready:
        service.servicer.model = planner
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.server.ports[0]}") as channel:
            service.stub = planner_pb2_grpc.PlannerServiceStub(channel)
            yield service
    finally:
        service.decoder.start_gate.set()
        service.decoder.advance_gate.set()
        service.server.stop()
        await running
        service.scheduler.close()
        planner.decoder = decoder


@pytest.fixture
async def service(loaded) -> AsyncIterator[Service]:
    async with serving(loaded, Telemetry()) as service:
        yield service


def pictures(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {path: random.integers(0, 256, (56, 56, 3), np.uint8) for path in (BASE, WRIST)}


def make_observation(seed: int = 0, images: dict[str, np.ndarray] | None = None) -> types_pb2.Observation:
    observation = types_pb2.Observation(prompt=TASKS[seed % 4])
    for path, pixels in (images or pictures(seed)).items():
        height, width, _ = pixels.shape
        observation.images[path].CopyFrom(
            types_pb2.Image(encoding=types_pb2.IMAGE_ENCODING_RAW, height=height, width=width, data=pixels.tobytes())
        )
    return observation


def make_request(seed: int = 0) -> planner_pb2.GenerateSubtaskRequest:
    return planner_pb2.GenerateSubtaskRequest(session_id="robot", observation=make_observation(seed))


def direct(planner: Planner, seed: int = 0, **options) -> GeneratedSubtask:
    written = GenerationOptions(**{"max_generation_tokens": MAX_TOKENS, **options})
    return planner.infer({**pictures(seed), "prompt": TASKS[seed % 4]}, options=written)


async def stream_call(service: Service, observation: types_pb2.Observation | None = None):
    request = planner_pb2.GenerateSubtaskStreamRequest(observation=observation or make_observation())
    return [message async for message in service.stub.GenerateSubtaskStream(request, timeout=20)]


async def test_the_text_is_that_of_a_direct_call(service):
    texts = set()
    for seed in range(4):
        expected = direct(service.planner, seed)
        response = await service.stub.GenerateSubtask(make_request(seed), timeout=60)
        assert (response.text, response.num_tokens) == (expected.text, expected.num_tokens)
        timing = response.timing
        parts = timing.queue_ms + timing.preprocess_ms + timing.model_ms + timing.postprocess_ms
        assert 0 < parts <= timing.total_ms == response.ms
        assert timing.batch_size == 1
        texts.add(response.text)
    assert len(texts) == 4


async def test_a_stream_is_the_same_text_as_it_is_written(service):
    for seed in range(4):
        expected = direct(service.planner, seed)
        *deltas, last = await stream_call(service, make_observation(seed))
        assert "".join(message.text_delta for message in (*deltas, last)) == expected.text == last.response.text
        assert len(deltas) > 1
        assert not any(message.done or message.HasField("response") for message in deltas)
        assert all(message.text_delta for message in deltas)
        assert last.done
        assert last.response.num_tokens == expected.num_tokens
        assert 0 < last.response.timing.model_ms <= last.response.ms


async def test_concurrent_requests_share_model_calls(service):
    expected = [direct(service.planner, seed).text for seed in range(3)]
    service.decoder.calls.clear()
    service.decoder.start_gate.clear()
    calls = [asyncio.ensure_future(service.stub.GenerateSubtask(make_request(0), timeout=60))]
    await service.until(lambda: service.decoder.calls)
    calls += [asyncio.ensure_future(service.stub.GenerateSubtask(make_request(seed), timeout=60)) for seed in (1, 2)]
    await service.until(lambda: len(service.scheduler._waiting) == 2)
    service.decoder.start_gate.set()
    responses = await asyncio.gather(*calls)
    assert [response.text for response in responses] == expected
    assert [response.timing.batch_size for response in responses] == [1, 2, 2]
    assert [rows for name, rows in service.decoder.calls if name == "start"] == [1, 2]


async def test_a_stream_lets_others_in_between_its_tokens(service):
    expected = direct(service.planner, 0), direct(service.planner, 1)
    assert expected[0].num_tokens > 4
    service.decoder.calls.clear()
    service.decoder.advance_gate.clear()
    stream = asyncio.ensure_future(stream_call(service, make_observation(0)))
    await service.until(lambda: ("advance", 2) in service.decoder.calls)
    other = asyncio.ensure_future(service.stub.GenerateSubtask(make_request(1), timeout=60))
    await service.until(lambda: service.scheduler._working)
    service.decoder.advance_gate.set()
    assert (await other).text == expected[1].text
    assert (await stream)[-1].response.text == expected[0].text
    assert service.decoder.calls[:5] == [("start", 1), ("advance", 2), ("start", 1), ("advance", 256), ("advance", 3)]


async def test_a_stream_that_is_given_up_is_written_no_further(service):
    assert direct(service.planner).num_tokens > 4
    service.decoder.calls.clear()
    service.decoder.advance_gate.clear()
    call = service.stub.GenerateSubtaskStream(
        planner_pb2.GenerateSubtaskStreamRequest(observation=make_observation()), timeout=60
    )
    await service.until(lambda: ("advance", 2) in service.decoder.calls)
    call.cancel()
    await service.until(lambda: not service.scheduler._num_queued)
    service.decoder.advance_gate.set()
    await service.stub.GenerateSubtask(make_request(), timeout=60)
    assert service.decoder.calls == [("start", 1), ("advance", 2), ("start", 1), ("advance", 256)]


def bad_observations() -> dict[str, tuple[types_pb2.Observation, str, str]]:
    """By name: an observation, the field that is at fault, and part of what is said about it."""
    cases = {}

    def add(name: str, field: str, message: str) -> types_pb2.Observation:
        observation = make_observation()
        cases[name] = (observation, field, message)
        return observation

    del add("missing camera", WRIST, "missing").images[WRIST]
    add("no camera at all", "observation", "no camera of a robot").images.clear()
    add("unknown entry", "observation/wrst", "unknown entry").tensors["observation/wrst"].CopyFrom(
        tensor_to_proto(np.zeros(3))
    )
    add("short picture", BASE, "9407 bytes").images[BASE].data = pictures()[BASE].tobytes()[:-1]
    add("jpeg that is none", BASE, "do not decode as JPEG").images[BASE].encoding = types_pb2.IMAGE_ENCODING_JPEG
    add("no prompt", "prompt", "prompt: ").ClearField("prompt")
    add("prompt of another kind", "prompt", "prompt: ").tensors["prompt"].CopyFrom(tensor_to_proto(np.zeros(3)))
    return cases


@pytest.mark.parametrize("name", bad_observations())
async def test_bad_input_is_refused_by_name(service, name):
    observation, field, message = bad_observations()[name]
    request = planner_pb2.GenerateSubtaskRequest(observation=observation)
    for call in (service.stub.GenerateSubtask(request, timeout=20), stream_call(service, observation)):
        with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert from_rpc_error(caught.value).field == field
    assert not service.decoder.calls


async def test_a_failure_of_the_model_is_an_error_and_no_empty_text(service):
    expected = direct(service.planner).text
    for call in (lambda: service.stub.GenerateSubtask(make_request(), timeout=20), lambda: stream_call(service)):
        service.decoder.failures.append(RuntimeError("out of memory"))
        with pytest.raises(grpc.aio.AioRpcError, match="internal error of the server") as caught:
            await call()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert (await service.stub.GenerateSubtask(make_request(), timeout=60)).text == expected


async def test_the_robots_state_may_be_there_and_changes_nothing(service):
    request = make_request()
    request.observation.tensors["observation/state"].CopyFrom(tensor_to_proto(np.full(8, np.nan)))
    response = await service.stub.GenerateSubtask(request, timeout=20)
    assert response.text == direct(service.planner).text


async def test_typed_pictures_of_a_robot_that_documents_channels_first(service):
    pixels = pictures()[BASE]
    request = planner_pb2.GenerateSubtaskRequest(observation=make_observation(0, {"images/cam_high": pixels}))
    response = await service.stub.GenerateSubtask(request, timeout=60)
    options = GenerationOptions(max_generation_tokens=MAX_TOKENS)
    observation = {"images/cam_high": pixels.transpose(2, 0, 1), "prompt": TASKS[0]}
    assert response.text == service.planner.infer(observation, options=options).text


async def test_a_changed_configuration_holds_from_the_next_request_on(service):
    usual = await service.stub.GenerateSubtask(make_request(), timeout=20)
    change = planner_pb2.UpdateConfigRequest(
        generation_prompt_format="{task}: ", max_generation_tokens=3, action_prompt_template="{subtask} ({task})"
    )
    updated = (await service.stub.UpdateConfig(change, timeout=20)).config
    assert updated == planner_pb2.PlannerConfig(
        generation_prompt_format="{task}: ",
        action_prompt_template="{subtask} ({task})",
        max_generation_tokens=3,
        temperature=0,
        top_k=0,
    )
    assert (await service.stub.GetConfig(planner_pb2.GetConfigRequest(), timeout=20)).config == updated
    changed = await service.stub.GenerateSubtask(make_request(), timeout=60)
    expected = direct(service.planner, generation_prompt_format="{task}: ", max_generation_tokens=3)
    assert (changed.text, changed.num_tokens) == (expected.text, 3)
    assert changed.text != usual.text

    await service.stub.UpdateConfig(planner_pb2.UpdateConfigRequest(temperature=5, top_k=50), timeout=20)
    config = (await service.stub.GetConfig(planner_pb2.GetConfigRequest(), timeout=20)).config
    assert (config.temperature, config.top_k, config.max_generation_tokens) == (5, 50, 3)
    texts = {(await service.stub.GenerateSubtask(make_request(), timeout=20)).text for _ in range(8)}
    assert len(texts) > 1
    await service.stub.UpdateConfig(planner_pb2.UpdateConfigRequest(temperature=0), timeout=20)
    assert (await service.stub.GenerateSubtask(make_request(), timeout=20)).text == changed.text


async def test_the_action_policys_prompt_comes_along(service):
    subtask = direct(service.planner).text
    response = await service.stub.GenerateSubtask(make_request(), timeout=60)
    assert response.action_prompt == f"{TASKS[0]}. Subtask: {subtask}"
    await service.stub.UpdateConfig(
        planner_pb2.UpdateConfigRequest(action_prompt_template="{subtask} ({task})"), timeout=20
    )
    observation = make_observation()
    observation.prompt = "Fold the towel."  # as it was sent, not as the planner reads it
    last = (await stream_call(service, observation))[-1].response
    assert (last.text, last.action_prompt) == (subtask, f"{subtask} (Fold the towel.)")


async def test_a_seed_makes_a_sampled_subtask_repeatable_and_has_it_run_alone(service):
    await service.stub.UpdateConfig(planner_pb2.UpdateConfigRequest(temperature=5, top_k=50), timeout=20)
    request = make_request()
    request.seed = 11
    texts = {(await service.stub.GenerateSubtask(request, timeout=60)).text for _ in range(4)}
    assert len(texts) == 1
    stream = planner_pb2.GenerateSubtaskStreamRequest(observation=request.observation, seed=11)
    messages = [message async for message in service.stub.GenerateSubtaskStream(stream, timeout=60)]
    assert messages[-1].response.text == texts.pop()

    service.decoder.calls.clear()
    service.decoder.start_gate.clear()
    calls = [asyncio.ensure_future(service.stub.GenerateSubtask(make_request(), timeout=60))]
    await service.until(lambda: service.decoder.calls)
    calls += [asyncio.ensure_future(service.stub.GenerateSubtask(request, timeout=60)) for _ in range(2)]
    await service.until(lambda: len(service.scheduler._waiting) == 2)
    service.decoder.start_gate.set()
    assert [response.timing.batch_size for response in await asyncio.gather(*calls)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generation_prompt_format", "Task: "),
        ("generation_prompt_format", "{task} {subtask}"),
        ("generation_prompt_format", "{task"),
        ("action_prompt_template", "{task}"),
        ("action_prompt_template", "{task!r} {subtask}"),
        ("max_generation_tokens", 0),
        ("max_generation_tokens", 257),
        ("temperature", -1),
        ("temperature", float("nan")),
    ],
)
async def test_a_change_that_cannot_be_changes_nothing(service, field, value):
    before = (await service.stub.GetConfig(planner_pb2.GetConfigRequest(), timeout=20)).config
    change = planner_pb2.UpdateConfigRequest(**{"top_k": 7, "action_prompt_template": "{task}, {subtask}"})
    setattr(change, field, value)
    with pytest.raises(grpc.aio.AioRpcError, match=f"{field}: ") as caught:
        await service.stub.UpdateConfig(change, timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(caught.value).field == field
    assert (await service.stub.GetConfig(planner_pb2.GetConfigRequest(), timeout=20)).config == before


async def test_metadata_says_what_is_served(service):
    metadata = await service.stub.GetPlannerMetadata(planner_pb2.GetPlannerMetadataRequest(), timeout=20)
    assert metadata.model_config_name == "pi05_subtask"
    assert metadata.server_version
    specs = {spec.path: spec for spec in metadata.image_specs}
    assert {"images/cam_high", "observation/exterior_image_1_left", BASE, WRIST} <= specs.keys()
    assert (specs[BASE].height, specs[BASE].width, specs[BASE].required) == (56, 56, False)
    assert specs["images/cam_high"].layout == types_pb2.IMAGE_LAYOUT_CHW


async def test_before_it_is_ready_only_the_configuration_is_answered_for(loaded):
    async with serving(loaded, Telemetry(), ready=False) as service:
        await service.stub.UpdateConfig(planner_pb2.UpdateConfigRequest(max_generation_tokens=2), timeout=20)
        for call in (
            service.stub.GenerateSubtask(make_request(), timeout=20),
            stream_call(service, make_observation()),
            service.stub.GetPlannerMetadata(planner_pb2.GetPlannerMetadataRequest(), timeout=20),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="loaded and warmed up") as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        service.servicer.model = service.planner
        assert (await service.stub.GenerateSubtask(make_request(), timeout=60)).num_tokens == 2


async def test_a_request_whose_time_is_over_never_reaches_the_accelerator(service):
    service.decoder.start_gate.clear()
    first = asyncio.ensure_future(service.stub.GenerateSubtask(make_request(), timeout=60))
    await service.until(lambda: service.decoder.calls)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.stub.GenerateSubtask(make_request(), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await service.until(lambda: not service.scheduler._num_queued)
    service.decoder.start_gate.set()
    await first
    assert [name for name, _ in service.decoder.calls] == ["start", "advance"]


async def test_a_token_is_asked_for(loaded):
    async with serving(loaded, Telemetry(), auth=AuthSettings(tokens=("secret",))) as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.GetConfig(planner_pb2.GetConfigRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", "Bearer secret"),)
        assert (await service.stub.GenerateSubtask(make_request(), timeout=60, metadata=metadata)).text


async def test_a_trace_leads_to_the_model_and_metrics_tell_the_rest(loaded):
    collector = Collector()
    settings = TelemetrySettings(otlp_endpoint=collector.endpoint, metrics=True, planner_metrics_port=0)
    telemetry = setup(settings, "planner")
    async with serving(loaded, telemetry) as service:
        await service.stub.GenerateSubtask(make_request(), timeout=60, metadata=CALLER.to_metadata())
        request = planner_pb2.GenerateSubtaskStreamRequest(observation=make_observation())
        call = service.stub.GenerateSubtaskStream(request, timeout=60, metadata=CALLER.to_metadata())
        num_tokens = [message async for message in call][-1].response.num_tokens
        samples = await asyncio.to_thread(scrape, telemetry)
    await asyncio.to_thread(telemetry.shutdown)
    collector.stop()

    assert collector.services == {"openpi-flash-planner"}
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    parents = {span.span_id: span.name for span in collector.spans}
    below = [(parents.get(span.parent_span_id, "robot"), span.name) for span in collector.spans]
    for method in ("PlannerService/GenerateSubtask", "PlannerService/GenerateSubtaskStream"):
        assert {("robot", method), (method, "prepare"), (method, "model")} <= set(below)
        assert samples["openpi_flash_requests_total", "OK", method] == 1
    assert below.count(("PlannerService/GenerateSubtaskStream", "model")) == num_tokens
    assert samples["openpi_flash_queue_depth",] == 0
