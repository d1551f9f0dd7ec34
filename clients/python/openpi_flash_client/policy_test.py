"""GrpcPolicy against a small PolicyService: what arrives, what comes back, and what happens when things go wrong."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from openpi_flash.v1 import inference_pb2, types_pb2

import openpi_flash_client
from openpi_flash_client import GrpcPolicy
from openpi_flash_client.conftest import ACTIONS, FakeServer

CERTIFICATES = Path(__file__).parents[3] / "tests/data/tls"


@pytest.fixture
def policy(server: FakeServer) -> Iterator[GrpcPolicy]:
    with GrpcPolicy("127.0.0.1", server.port) as policy:
        yield policy


def test_an_observation_goes_out_and_actions_come_back(server, policy):
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    answer = policy.infer(
        {
            "images": {"cam_high": image, "strided": image.transpose(2, 0, 1)},
            "observation/state": np.arange(3, dtype=">f4"),
            "gripper": 0.5,
            "prompt": "go",
        },
        seed=2,
        noise=np.ones((2, 3)),
        num_steps=5,
        mode="action_only",
        timeout_s=3,
        traceparent="00-a",
    )
    np.testing.assert_array_equal(answer["actions"], ACTIONS + 2)
    assert answer["actions"].dtype == np.float64
    assert answer["actions"].flags.writeable
    assert answer["policy_timing"] == {"infer_ms": 5.0}
    assert answer["server_timing"] == {"infer_ms": 7.0}
    assert answer["timing"]["batch_size"] == 1
    assert "subtask" not in answer

    (received,) = server.received
    with GrpcPolicy("127.0.0.1", server.port, open_loop_horizon=2) as stepwise:
        rows = [stepwise.infer({"prompt": "go"}, seed=2)["actions"] for _ in range(2)]
    np.testing.assert_array_equal(rows, ACTIONS + 2)
    assert server.received.pop().request.seed == 2
    policy.infer({"seed": 9, "num_steps": 5, "mode": "action_only", "noise": np.ones((2, 3))}, seed=2)
    as_entries = server.received.pop().request
    assert (as_entries.seed, as_entries.num_steps, as_entries.mode) == (2, 5, inference_pb2.MODE_ACTION_ONLY)
    assert as_entries.noise == received.request.noise
    assert not as_entries.observation.tensors
    assert 0 < received.timeout_ms <= 3000
    assert received.traceparent == "00-a"
    request = received.request
    assert request.session_id == policy.session_id
    assert (request.seed, request.num_steps, request.mode) == (2, 5, inference_pb2.MODE_ACTION_ONLY)
    assert (request.noise.dtype, request.noise.data) == (types_pb2.DTYPE_FLOAT32, np.ones((2, 3), "<f4").tobytes())
    assert request.observation.prompt == "go"
    tensors = request.observation.tensors
    assert set(tensors) == {"images/cam_high", "images/strided", "observation/state", "gripper"}
    assert (tensors["images/cam_high"].dtype, tensors["images/cam_high"].data) == (1 + 1, image.tobytes())
    assert list(tensors["images/strided"].shape) == [3, 2, 4]
    assert tensors["images/strided"].data == image.transpose(2, 0, 1).tobytes()
    assert tensors["observation/state"].data == np.arange(3, dtype="<f4").tobytes()
    assert (list(tensors["gripper"].shape), tensors["gripper"].dtype) == ([], types_pb2.DTYPE_FLOAT64)


@pytest.mark.parametrize("dtype", [name.removeprefix("DTYPE_").lower() for name in types_pb2.Dtype.keys()[1:]])
def test_every_wire_dtype_can_be_sent(server, policy, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    array = np.ones(2, dtype)
    policy.infer({"x": array})
    tensor = server.received[0].request.observation.tensors["x"]
    assert types_pb2.Dtype.Name(tensor.dtype) == f"DTYPE_{array.dtype.name.upper()}"
    assert tensor.data == array.tobytes()


def test_requests_share_a_stream_and_threads_do_not(server, policy):
    for seed in range(5):
        np.testing.assert_array_equal(policy.infer({}, seed=seed)["actions"], ACTIONS + seed)
    assert server.num_streams == 1
    barrier = threading.Barrier(4)

    def wait_for_company(*_: Any) -> None:
        barrier.wait(10)  # returns when four requests are on their way at once

    server.behave = wait_for_company
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda seed: policy.infer({}, seed=seed)["actions"], range(4)))
    for seed, actions in enumerate(answers):
        np.testing.assert_array_equal(actions, ACTIONS + seed)
    assert server.num_streams == 4


def test_metadata_and_reset(server, policy):
    metadata = policy.get_server_metadata()
    assert metadata["reset_pose"] == [0.5, -1.5]
    assert metadata["model_config_name"] == "pi05_droid"
    assert metadata["image_specs"][0]["path"] == "images/cam_high"
    policy.reset()
    with (
        GrpcPolicy("127.0.0.1", server.port, session_id="unknown") as other,
        pytest.raises(openpi_flash_client.InvalidArgumentError, match="session_id: unknown") as caught,
    ):
        other.reset()
    assert (caught.value.code, caught.value.field) == ("INVALID_ARGUMENT", "session_id")


@pytest.mark.parametrize(
    ("obs", "options", "problem"),
    [
        ({"a": {"b": None}}, {}, "a/b: NoneType of dtype object"),
        ({"a": "text"}, {}, "a: str of dtype <U4 cannot be sent"),
        ({"a/b": 1, "a": {"b": 1}}, {}, "a/b: appears twice"),
        ({"prompt": 5}, {}, "prompt: a int; a string is expected"),
        ({"prompt": b"\xff"}, {}, "prompt: not UTF-8"),
        ({}, {"mode": "both"}, "mode: 'both' is not one of default"),
        ({}, {"seed": -1}, "seed: -1; a whole number"),
        ({}, {"seed": 1.5}, "seed: 1.5; a whole number"),
        ({}, {"num_steps": 1 << 32}, "num_steps: 4294967296; a whole number of at most 32 bits"),
        ({}, {"noise": "loud"}, "noise: an array of numbers"),
    ],
)
def test_what_cannot_be_sent_is_named(server, policy, obs, options, problem):
    with pytest.raises(openpi_flash_client.InvalidArgumentError, match=problem) as caught:
        policy.infer(obs, **options)
    assert caught.value.field == problem.partition(":")[0]
    assert isinstance(caught.value, ValueError)
    assert not server.received


@pytest.mark.parametrize(
    ("code", "kind", "builtin"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, openpi_flash_client.InvalidArgumentError, ValueError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, openpi_flash_client.ServerBusyError, Exception),
        (grpc.StatusCode.DEADLINE_EXCEEDED, openpi_flash_client.PolicyTimeoutError, TimeoutError),
        (grpc.StatusCode.UNAVAILABLE, openpi_flash_client.UnavailableError, ConnectionError),
        (grpc.StatusCode.FAILED_PRECONDITION, openpi_flash_client.FailedPreconditionError, Exception),
        (grpc.StatusCode.INTERNAL, openpi_flash_client.PolicyError, Exception),
    ],
)
def test_refusals_are_typed_and_leave_the_stream(server, policy, code, kind, builtin):
    server.behave = lambda *_: types_pb2.Error(code=code.value[0], message="no", field="state")
    with pytest.raises(kind, match="no") as caught:
        policy.infer({})
    assert isinstance(caught.value, builtin)
    assert (caught.value.code, caught.value.field) == (code.name, "state")
    server.behave = lambda *_: None
    policy.infer({})
    assert server.num_streams == 1


def test_a_timeout_cancels_the_request(server, policy):
    cancelled = threading.Event()

    def hang(_: Any, context: Any) -> None:
        context.add_callback(cancelled.set)
        cancelled.wait(10)

    server.behave = hang
    start = time.monotonic()
    with pytest.raises(openpi_flash_client.PolicyTimeoutError, match=r"within 0\.2 s"):
        policy.infer({}, timeout_s=0.2)
    assert time.monotonic() - start < 5
    assert cancelled.wait(10)
    server.behave = lambda *_: None
    policy.infer({})


def test_a_lost_request_is_sent_once_more(server, policy):
    lost = []

    def lose(request: Any, context: Any) -> None:
        lost.append(request)
        if len(lost) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "going away")

    server.behave = lose
    np.testing.assert_array_equal(policy.infer({}, seed=3)["actions"], ACTIONS + 3)
    assert [request.request.seed for request in lost] == [3, 3]

    def always_lose(_: Any, context: Any) -> None:
        context.abort(grpc.StatusCode.UNAVAILABLE, "going away")

    server.behave = always_lose
    with pytest.raises(openpi_flash_client.UnavailableError, match="going away"):
        policy.infer({})
    assert len(server.received) == 4


def test_a_refused_stream_is_not_tried_again(server, policy):
    server.behave = lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
    with pytest.raises(openpi_flash_client.AuthenticationError, match="who are you"):
        policy.infer({})
    assert len(server.received) == 1


def test_a_restart_of_the_server_is_survived(server, policy):
    policy.infer({})
    server.stop()
    with pytest.raises(openpi_flash_client.PolicyTimeoutError):
        policy.infer({}, timeout_s=0.2)
    threading.Timer(0.3, server.start).start()
    np.testing.assert_array_equal(policy.infer({}, seed=1, timeout_s=20)["actions"], ACTIONS + 1)


def test_an_answer_to_another_request_is_never_handed_over(server, policy):
    def shift(request: Any, _: Any) -> None:
        request.request_id += 1

    server.behave = shift
    with pytest.raises(openpi_flash_client.PolicyError, match="in place of"):
        policy.infer({})


def test_no_server_is_an_error_after_a_while(unused_tcp_port):
    with pytest.raises(openpi_flash_client.UnavailableError, match=f"no ready server at 127.0.0.1:{unused_tcp_port}"):
        GrpcPolicy("127.0.0.1", unused_tcp_port, connect_timeout_s=0.3)


def test_a_server_that_comes_later_is_waited_for(unused_tcp_port):
    server = FakeServer()
    server.port = unused_tcp_port
    threading.Timer(0.3, server.start).start()
    with GrpcPolicy("127.0.0.1", unused_tcp_port, connect_timeout_s=20) as policy:
        policy.infer({})
    server.stop()


def test_a_server_that_comes_later_is_found_without_grpcs_event_engine(unused_tcp_port):
    script = """if True:
        import logging, sys
        from openpi_flash_client import GrpcPolicy
        logging.basicConfig(level=logging.INFO, stream=sys.stdout)
        with GrpcPolicy("127.0.0.1", int(sys.argv[1]), connect_timeout_s=4) as policy:
            policy.infer({})
        """
    off = "-event_engine_client,-event_engine_listener,-event_engine_for_all_other_endpoints"
    command, environment = [sys.executable, "-c", script, str(unused_tcp_port)], {**os.environ, "GRPC_EXPERIMENTS": off}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as robot:
        assert "waiting for the server" in robot.stdout.readline()
        server = FakeServer()
        server.port = unused_tcp_port
        server.start()
        _, errors = robot.communicate()
        server.stop()
    assert robot.returncode == 0, errors


def test_a_closed_policy_says_so_and_leaves_no_threads(server):
    before = set(threading.enumerate())
    policy = GrpcPolicy("127.0.0.1", server.port, token="sesame")  # noqa: S106
    policy.infer({})
    assert server.metadata[0]["authorization"] == "Bearer sesame"
    policy.close()
    for call in (lambda: policy.infer({}), policy.reset, policy.get_server_metadata):
        with pytest.raises(openpi_flash_client.PolicyError, match="closed"):
            call()

    def left() -> list[str]:  # but for the workers of the server above
        new = set(threading.enumerate()) - before
        return [thread.name for thread in new if not thread.name.startswith("ThreadPoolExecutor")]

    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left() == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"client_cert_file": "a"}, "go together"),
        ({"ca_file": "a", "insecure_plaintext": True}, "of no use"),
        ({"ca_file": "a", "unix_socket": "b"}, "of no use"),
    ],
)
def test_options_that_contradict_each_other(options, problem):
    with pytest.raises(ValueError, match=problem):
        GrpcPolicy(**options)


def test_certificates_are_checked_both_ways():
    def read(name: str) -> bytes:
        return (CERTIFICATES / name).read_bytes()

    pair = (read("server.key"), read("server.pem"))
    server = FakeServer()
    server.start(grpc.ssl_server_credentials([pair], read("ca.pem"), require_client_auth=True))
    ca, ours = {"ca_file": CERTIFICATES / "ca.pem"}, {"client_cert_file": CERTIFICATES / "client.pem"}
    ours["client_key_file"] = CERTIFICATES / "client.key"
    with GrpcPolicy("127.0.0.1", server.port, **ca, **ours) as policy:
        np.testing.assert_array_equal(policy.infer({}, seed=1)["actions"], ACTIONS + 1)
    for options in (ca, ours, {}):  # no certificate of ours; a server signed by nobody we know; plain text
        with pytest.raises(openpi_flash_client.UnavailableError, match="no ready server"):
            GrpcPolicy("127.0.0.1", server.port, connect_timeout_s=0.3, **options)
    server.stop()


def test_plain_text_leaves_this_machine_only_when_told(server, monkeypatch):
    """`robot.test` resolves nowhere: what counts is which kind of channel is opened for it."""
    opened = []
    monkeypatch.setattr(grpc, "insecure_channel", lambda address, _: opened.append(f"plain {address}") or _Nothing())
    monkeypatch.setattr(grpc, "secure_channel", lambda address, *_: opened.append(f"tls {address}") or _Nothing())
    for options in (
        {"host": "robot.test"},
        {"host": "robot.test", "insecure_plaintext": True},
        {"host": "::1"},
        {"host": "10.0.0.1"},
        {"unix_socket": "x.sock"},
        {},
    ):
        GrpcPolicy(**options)
    assert opened == [
        "tls robot.test:50051",
        "plain robot.test:50051",
        "plain [::1]:50051",
        "tls 10.0.0.1:50051",
        "plain unix:x.sock",
        "plain localhost:50051",
    ]


class _Nothing:
    """A channel on which every call succeeds."""

    def unary_unary(self, _: str) -> Callable[..., bytes]:
        return lambda *_, **__: b""

    def stream_stream(self, _: str) -> None:
        return None

    def subscribe(self, _: object) -> None:
        pass

    def unsubscribe(self, _: object) -> None:
        pass
