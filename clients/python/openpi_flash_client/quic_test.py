"""FlashTransportPolicy against a small PolicyService behind the real edge."""

import asyncio
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import openpi_flash_transport
import pytest
from openpi_flash.v1 import inference_pb2, types_pb2
from PIL import Image

import openpi_flash_client
from openpi_flash_client import FlashTransportPolicy, GrpcPolicy, PolicyTimeoutError
from openpi_flash_client.conftest import ACTIONS, Edge, FakeServer

CERTIFICATES = Path(__file__).parents[3] / "tests/data/tls"
RAW, JPEG, PNG = types_pb2.IMAGE_ENCODING_RAW, types_pb2.IMAGE_ENCODING_JPEG, types_pb2.IMAGE_ENCODING_PNG
LOSSLESS = types_pb2.IMAGE_ENCODING_LOSSLESS
HWC, CHW = types_pb2.IMAGE_LAYOUT_HWC, types_pb2.IMAGE_LAYOUT_CHW


def spec(path: str, encoding: Any = RAW, layout: Any = HWC, **more: Any) -> types_pb2.ImageSpec:
    return types_pb2.ImageSpec(path=path, height=8, width=6, layout=layout, encoding=encoding, **more)


def picture(height: int = 8, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def pixels(image: types_pb2.Image) -> np.ndarray:
    """As the server sees them, (height, width, 3)."""
    if image.encoding != RAW:
        return np.asarray(Image.open(io.BytesIO(image.data)))
    flat = np.frombuffer(image.data, np.uint8)
    if image.layout == CHW:
        return flat.reshape(3, image.height, image.width).transpose(1, 2, 0)
    return flat.reshape(image.height, image.width, 3)


def jpeg(image: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture
def specs(server: FakeServer) -> list[types_pb2.ImageSpec]:
    """What the server asks for; to be changed before a policy connects."""
    server.image_specs = [
        spec("raw"),
        spec("png", PNG),
        spec("jpeg", JPEG, jpeg_quality=95, jpeg_subsampling="4:4:4"),
        spec("chw", layout=CHW),
        spec("a/raw"),
    ]
    return server.image_specs


@pytest.fixture(params=["quic", "grpc"])
def policy(request: pytest.FixtureRequest, specs: Any, server: FakeServer, edge: Edge) -> Iterator[Any]:
    """Every transport obeys the server's metadata."""
    with connect(edge) if request.param == "quic" else GrpcPolicy("127.0.0.1", server.port) as policy:
        yield policy


@pytest.fixture
def quic(edge: Edge) -> Iterator[FlashTransportPolicy]:
    with connect(edge) as policy:
        yield policy


def connect(edge: Edge, *, port: int | None = None, **options: Any) -> FlashTransportPolicy:
    return FlashTransportPolicy("127.0.0.1", port or edge.port, fingerprint=edge.fingerprint, **options)


def observation_sent(policy: Any, server: FakeServer, observation: dict[str, Any]) -> types_pb2.Observation:
    policy.infer({**observation, "state": np.zeros(2), "prompt": "go"})
    request = server.received.pop().request
    assert request.session_id == policy.session_id
    assert request.observation.prompt == "go"
    assert request.observation.tensors["state"].data == bytes(16)
    return request.observation


def test_pictures_travel_as_the_server_asks(policy, server):
    image = picture()
    channels_first = np.ascontiguousarray(image.transpose(2, 0, 1))
    sent = observation_sent(policy, server, {"raw": image, "png": channels_first, "jpeg": image, "chw": channels_first})
    assert set(sent.tensors) == {"state"}
    assert [sent.images[name].encoding for name in ("raw", "png", "jpeg", "chw")] == [RAW, PNG, JPEG, RAW]
    for name in ("raw", "png", "chw"):
        np.testing.assert_array_equal(pixels(sent.images[name]), image)
    assert sent.images["raw"].data == image.tobytes()
    assert sent.images["chw"].data == channels_first.tobytes()
    assert sent.images["jpeg"].data == jpeg(image, quality=95, subsampling="4:4:4")


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (37, 61), (1, 9)])
def test_a_jpeg_is_the_file_that_pillow_writes(height, width, subsampling):
    image = picture(height, width)
    for quality in (1, 75, 90, 100):
        camera = openpi_flash_transport.Camera(height, width, "jpeg", quality, subsampling)
        fields = openpi_flash_transport.prepare([("camera", image, False, camera)])
        observation = inference_pb2.InferRequest.FromString(fields).observation
        assert observation.images["camera"].data == jpeg(image, quality=quality, subsampling=subsampling)


def test_lossless_pictures_are_png_on_a_slow_link(server, edge):
    server.image_specs = [spec("camera", LOSSLESS)]
    with relay(edge.port, bytes_per_second=1e6) as port, connect(edge, port=port) as policy:
        sent = observation_sent(policy, server, {"camera": picture()}).images["camera"]
    assert sent.encoding == PNG
    np.testing.assert_array_equal(pixels(sent), picture())


def test_lossless_pictures_are_raw_where_the_link_is_not_known(server):
    server.image_specs = [spec("camera", LOSSLESS)]
    with GrpcPolicy("127.0.0.1", server.port) as policy:
        assert observation_sent(policy, server, {"camera": picture()}).images["camera"].encoding == RAW


@contextlib.contextmanager
def relay(server_port: int, *, bytes_per_second: float) -> Iterator[int]:
    """A port that leads to the server's over a link that carries no more in either direction."""
    with socket.socket(type=socket.SOCK_DGRAM) as near, socket.socket(type=socket.SOCK_DGRAM) as far:
        near.bind(("127.0.0.1", 0))
        far.connect(("127.0.0.1", server_port))
        client: Any = None

        def up() -> None:
            nonlocal client
            while True:
                data, client = near.recvfrom(65536)
                if not data:
                    return
                time.sleep(len(data) / bytes_per_second)
                far.send(data)

        def down() -> None:
            while data := far.recv(65536):
                time.sleep(len(data) / bytes_per_second)
                near.sendto(data, client)

        threads = [threading.Thread(target=up), threading.Thread(target=down)]
        for thread in threads:
            thread.start()
        try:
            yield near.getsockname()[1]
        finally:
            near.sendto(b"", near.getsockname())
            far.shutdown(socket.SHUT_RD)
            for thread in threads:
                thread.join()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("raw", picture().astype(np.float32) / np.float32(255)),
        ("raw", picture() / 255),
        ("raw", picture()[:, ::-1][:, ::-1]),
        ("raw", np.asfortranarray(picture())),
        ("raw", picture()[..., ::-1]),
        ("chw", picture().transpose(2, 0, 1)),
        ("chw", (picture() / 255).transpose(2, 0, 1)),
    ],
)
def test_whatever_the_memory_looks_like(policy, server, name, value):
    expected = value if value.dtype == np.uint8 else (255 * value).astype(np.uint8)
    sent = observation_sent(policy, server, {name: value}).images[name]
    np.testing.assert_array_equal(pixels(sent), expected.transpose(1, 2, 0) if name == "chw" else expected)


def test_another_size_is_scaled_with_padding(policy, server):
    for name, value in (("raw", picture(8, 12)), ("chw", picture(8, 12).transpose(2, 0, 1))):
        sent = observation_sent(policy, server, {name: value}).images[name]
        scaled = np.asarray(Image.fromarray(picture(8, 12)).resize((6, 4), Image.Resampling.BILINEAR))
        assert (sent.height, sent.width) == (8, 6)
        np.testing.assert_array_equal(pixels(sent)[2:6], scaled)
        assert not pixels(sent)[:2].any() and not pixels(sent)[6:].any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("another", picture()),
        ("raw", np.zeros((8, 6), np.uint8)),
        ("raw", np.zeros((8, 6, 4), np.uint8)),
        ("raw", np.zeros((3, 6, 3), np.uint8)),
        ("raw", np.zeros((0, 6, 3), np.uint8)),
        ("raw", picture().astype(np.int32)),
        ("raw", picture().astype(np.float16)),
        ("raw", np.full((8, 6, 3), 1.5)),
        ("raw", np.full((8, 6, 3), np.nan)),
        ("chw", picture()),
    ],
)
def test_what_is_no_picture_is_left_to_the_server(policy, server, name, value):
    sent = observation_sent(policy, server, {name: value, "png": picture()})
    assert set(sent.images) == {"png"}
    assert list(sent.tensors[name].shape) == list(value.shape)
    assert sent.tensors[name].data == value.tobytes()


def test_names_that_appear_twice(policy, server):
    with pytest.raises(openpi_flash_client.InvalidArgumentError, match="a/b: appears twice"):
        policy.infer({"a": {"b": 1}, "a/b": 1})
    with pytest.raises(openpi_flash_client.InvalidArgumentError, match="a/raw: appears twice"):
        policy.infer({"a": {"raw": picture()}, "a/raw": picture()})


def test_what_a_newer_server_asks_for_is_not_prepared(server, edge):
    server.image_specs = [spec("newer", 9), spec("odd", JPEG, jpeg_quality=90, jpeg_subsampling="4:1:1")]
    with connect(edge) as policy:
        sent = observation_sent(policy, server, {"newer": picture(), "odd": picture()})
    assert set(sent.tensors) == {"newer", "odd", "state"}


def test_a_request_and_its_answer(server, quic):
    answer = quic.infer({}, seed=2, noise=np.ones((2, 3)), num_steps=5, mode="action_only", timeout_s=3)
    np.testing.assert_array_equal(answer["actions"], ACTIONS + 2)
    assert answer["policy_timing"] == {"infer_ms": 5.0}
    received = server.received.pop()
    assert (received.request.seed, received.request.num_steps) == (2, 5)
    assert 0 < received.timeout_ms <= 3000
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    quic.infer({}, traceparent=trace)
    assert server.received.pop().traceparent.split("-")[1] == trace.split("-")[1]
    assert quic.get_server_metadata()["model_config_name"] == "pi05_droid"
    quic.reset()


def test_a_policy_of_steps(server, edge):
    with connect(edge, open_loop_horizon=2) as policy:
        rows = [policy.infer({}, seed=2)["actions"] for _ in range(2)]
    np.testing.assert_array_equal(rows, ACTIONS + 2)
    assert len(server.received) == 1

    async def drive() -> list[np.ndarray]:
        return [(await policy.infer_async({}, seed=1))["actions"] for _ in range(4)]

    with connect(edge, open_loop_horizon=2, prefetch_steps=1) as policy:
        rows = asyncio.run(drive())
    np.testing.assert_array_equal(rows[0], ACTIONS[0] + 1)
    np.testing.assert_array_equal(rows[1], ACTIONS[1] + 1)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, openpi_flash_client.InvalidArgumentError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, openpi_flash_client.ServerBusyError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, openpi_flash_client.PolicyTimeoutError),
        (grpc.StatusCode.UNAVAILABLE, openpi_flash_client.UnavailableError),
        (grpc.StatusCode.INTERNAL, openpi_flash_client.PolicyError),
    ],
)
def test_refusals_are_typed(server, quic, code, kind):
    server.behave = lambda *_: types_pb2.Error(code=code.value[0], message="no", field="state")
    with pytest.raises(kind, match="no") as caught:
        quic.infer({})
    assert (caught.value.code, caught.value.field) == (code.name, "state")
    with pytest.raises(kind, match="no"):
        asyncio.run(quic.infer_async({}))


class Hanging:
    """Requests that are answered when `release` is set."""

    def __init__(self, server: FakeServer) -> None:
        self.begun, self.release, self.cancelled = threading.Semaphore(0), threading.Event(), threading.Event()
        server.behave = self

    def __call__(self, _: Any, context: Any) -> None:
        context.add_callback(self.cancelled.set)
        self.begun.release()
        self.release.wait(20)

    def once_begun(self, action: Callable[[], object]) -> None:
        """Has something done, in another thread, when a request has reached the server."""
        threading.Thread(target=lambda: self.begun.acquire(timeout=10) and action()).start()


@pytest.fixture
def hanging(server: FakeServer) -> Iterator[Hanging]:
    hanging = Hanging(server)
    yield hanging
    hanging.release.set()


def test_a_timeout_cancels_the_request(quic, hanging):
    timeout_s = 0.1
    while not hanging.begun.acquire(blocking=False):  # where a machine is slow, the request may be too late to be sent
        timeout_s *= 2
        with pytest.raises(PolicyTimeoutError, match=r"127\.0\.0\.1:\d+ within [\d.]+ s|time ran out"):
            quic.infer({}, timeout_s=timeout_s)
    assert hanging.cancelled.wait(10)


def test_other_threads_go_on_while_one_waits(quic, hanging):
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(quic.infer({}, seed=3)))
    waiting.start()
    assert hanging.begun.acquire(timeout=10)
    assert sum(range(100_000)) and not answers  # this thread computes while that one waits
    hanging.release.set()
    waiting.join(10)
    np.testing.assert_array_equal(answers[0]["actions"], ACTIONS + 3)


def test_the_keyboard_interrupts_a_call(quic, hanging):
    hanging.once_begun(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        quic.infer({}, timeout_s=20)
    assert hanging.cancelled.wait(10)


async def test_an_event_loop_waits_for_several_at_once(quic, hanging):
    threads = threading.active_count()
    calls = [asyncio.ensure_future(quic.infer_async({}, seed=seed)) for seed in range(8)]
    assert await asyncio.to_thread(lambda: all(hanging.begun.acquire(timeout=10) for _ in calls))
    assert threading.active_count() <= threads + 9  # those of the FakeServer, and that of the line above
    hanging.release.set()
    for seed, answer in enumerate(await asyncio.gather(*calls)):
        np.testing.assert_array_equal(answer["actions"], ACTIONS + seed)


async def test_a_cancelled_call_is_cancelled_at_the_server(quic, hanging):
    call = asyncio.ensure_future(quic.infer_async({}))
    assert await asyncio.to_thread(hanging.begun.acquire, timeout=10)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(hanging.cancelled.wait, 10)


def test_an_answer_for_an_event_loop_that_is_gone_goes_nowhere(quic, hanging):
    loop, called = asyncio.new_event_loop(), threading.Event()
    left_behind = loop.create_task(quic.infer_async({}))
    loop.run_until_complete(asyncio.wait_for(asyncio.to_thread(hanging.begun.acquire), 10))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    call = loop.call_soon_threadsafe

    def record(*arguments: Any) -> None:
        try:
            call(*arguments)
        finally:
            called.set()

    loop.call_soon_threadsafe = record
    hanging.release.set()
    assert called.wait(10), "the answer has come"
    assert not left_behind.done()
    np.testing.assert_array_equal(quic.infer({}, seed=1)["actions"], ACTIONS + 1)


def test_a_restart_of_the_edge_is_survived_and_its_wishes_are_asked_for_again(server, edge):
    server.image_specs = [spec("camera", PNG)]
    with connect(edge) as policy:
        assert observation_sent(policy, server, {"camera": picture()}).images["camera"].encoding == PNG
        edge.kill()
        with pytest.raises(PolicyTimeoutError, match=r"within 1\.5 s"):
            policy.infer({}, timeout_s=1.5)
        server.image_specs = [spec("camera", RAW)]
        threading.Timer(0.3, edge.start).start()
        np.testing.assert_array_equal(policy.infer({}, seed=1, timeout_s=20)["actions"], ACTIONS + 1)
        server.received.clear()
        assert observation_sent(policy, server, {"camera": picture()}).images["camera"].encoding == RAW


def test_wishes_are_asked_for_again_after_a_refusal(server, edge):
    server.image_specs = [spec("camera", PNG)]
    with connect(edge) as policy:
        server.image_specs = [spec("camera", RAW)]
        server.behave = lambda *_: types_pb2.Error(code=3, message="another size")
        with pytest.raises(openpi_flash_client.InvalidArgumentError):
            policy.infer({"camera": picture()})
        server.behave, server.received = lambda *_: None, []
        assert observation_sent(policy, server, {"camera": picture()}).images["camera"].encoding == RAW


def test_whom_to_trust(edge, quic):
    def refused(problem: str, **options: Any) -> None:
        with pytest.raises(openpi_flash_client.AuthenticationError, match=problem):
            FlashTransportPolicy("127.0.0.1", edge.port, **options)

    refused("UnknownIssuer")  # nobody whom this machine trusts has signed it
    refused("fingerprint", fingerprint="00" * 32)
    for options in ({"insecure_skip_verify": True}, {"ca_file": edge.directory / "edge-cert.pem"}):
        FlashTransportPolicy("127.0.0.1", edge.port, **options).close()
    refused("not valid for name", ca_file=edge.directory / "edge-cert.pem", server_name="robot.test")


def test_certificates_are_checked_both_ways(edge):
    edge.kill()
    pair = [str(CERTIFICATES / name) for name in ("server.pem", "server.key", "ca.pem")]
    edge.start("--cert-file", pair[0], "--key-file", pair[1], "--client-ca-file", pair[2])
    ours = {"client_cert_file": CERTIFICATES / "client.pem", "client_key_file": CERTIFICATES / "client.key"}
    with FlashTransportPolicy("localhost", edge.port, ca_file=CERTIFICATES / "ca.pem", **ours) as policy:
        policy.infer({})
    with pytest.raises(openpi_flash_client.AuthenticationError, match="certificate"):
        FlashTransportPolicy("127.0.0.1", edge.port, ca_file=CERTIFICATES / "ca.pem").infer({})


def test_tokens(server, edge, tmp_path):
    edge.kill()
    tokens = tmp_path / "tokens"
    tokens.write_text("sesame\n")
    edge.start("--tokens-file", str(tokens))
    with connect(edge, token="sesame") as policy:  # noqa: S106
        policy.infer({})
    for options in ({}, {"token": "wrong"}):
        with pytest.raises(openpi_flash_client.AuthenticationError):
            connect(edge, **options)


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"fingerprint": "00" * 32, "insecure_skip_verify": True}, ValueError, "at most one"),
        ({"fingerprint": "00"}, ValueError, "64 hexadecimal digits"),
        ({"ca_file": "/nowhere"}, FileNotFoundError, "/nowhere"),
        ({"ca_file": __file__}, ValueError, "no certificate"),
        ({"client_cert_file": __file__}, ValueError, "go together"),
        ({"open_loop_horizon": 0}, ValueError, "open_loop_horizon"),
    ],
)
def test_options_that_cannot_be_used(options, error, problem):
    with pytest.raises(error, match=problem):
        FlashTransportPolicy("127.0.0.1", 9, **options)


def test_no_server_is_an_error_after_a_while(unused_udp_port):
    with pytest.raises(openpi_flash_client.UnavailableError, match=r"no ready server at 127\.0\.0\.1:\d+ within 0.5 s"):
        FlashTransportPolicy("127.0.0.1", unused_udp_port, connect_timeout_s=0.5)


def test_a_closed_policy_says_so(edge):
    policy = connect(edge)
    policy.infer({})
    policy.close()
    policy.close()
    for call in (lambda: policy.infer({}), policy.reset, policy.get_server_metadata):
        with pytest.raises(openpi_flash_client.PolicyError, match="closed"):
            call()


def test_closing_ends_a_call_in_flight(quic, hanging):
    hanging.once_begun(quic.close)
    with pytest.raises(openpi_flash_client.PolicyError, match="the policy is closed") as caught:
        quic.infer({}, timeout_s=20)
    assert caught.value.code == "CANCELLED"


async def test_closing_ends_a_call_of_an_event_loop(quic, hanging):
    call = asyncio.ensure_future(quic.infer_async({}, timeout_s=60))
    assert await asyncio.to_thread(hanging.begun.acquire, timeout=10)
    quic.close()
    with pytest.raises(openpi_flash_client.PolicyError, match="the policy is closed") as caught:
        await asyncio.wait_for(call, 10)
    assert caught.value.code == "CANCELLED"


def test_without_the_extension_the_rest_works_and_an_error_says_what_to_install():
    code = """
import sys
sys.modules["openpi_flash_transport"] = None
import openpi_flash_client
openpi_flash_client.GrpcPolicy
try:
    from openpi_flash_client import FlashTransportPolicy
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "install openpi-flash-client[quic]" in done.stdout
