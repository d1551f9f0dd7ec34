"""What a robot carries out with real-time chunking, and what it tells the server."""

import concurrent.futures
import threading
from typing import Any

import numpy as np
import pytest

from openpi_flash_client import FailedPreconditionError, GrpcPolicy
from openpi_flash_client.realtime import RealTimePolicy

HORIZON = 10


class Server:
    """Gives chunks of ten steps, each after the latency that `latencies` has for it; step s of a chunk is [t, s]."""

    def __init__(self, method: str = "guided") -> None:
        self.method = method
        self.asked: list[dict[str, Any]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.latency = 0.0
        self.now = 0.0
        self.error: Exception | None = None
        self.is_closed = False

    def infer(self, obs: Any, **options: Any) -> dict[str, Any]:
        self.asked.append({**obs, **options})
        assert self.may_answer.wait(10)
        self.now += self.latency
        if self.error is not None:
            raise self.error
        return {"actions": np.array([[obs["time"], step] for step in range(HORIZON)]), "timing": {}}

    def get_server_metadata(self) -> dict[str, Any]:
        return {"real_time_chunking": self.method}

    def reset(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


def make(server: Server, **changes: Any) -> RealTimePolicy:
    options = {"control_hz": 10, "execution_horizon": 4, "clock": lambda: server.now, **changes}
    return RealTimePolicy(server, **options)


def drive(policy: RealTimePolicy, times: range, **entries: Any) -> list[list[int]]:
    return [policy.infer({"time": time, **entries})["actions"].tolist() for time in times]


def answered(policy: RealTimePolicy) -> None:
    concurrent.futures.wait([policy._next])


def test_the_server_is_told_what_will_be_over_when_its_answer_is_there():
    server = Server()
    server.latency = 0.15  # a step and a half, which the robot sees as two
    with make(server) as policy:
        assert policy.delay == 0
        assert drive(policy, range(4)) == [[0, step] for step in range(4)]
        assert policy.delay == 2
        server.may_answer.clear()
        assert drive(policy, range(4, 6)) == [[0, 4], [0, 5]]
        first = policy.infer({"time": 0})["actions"]
        server.may_answer.set()
        answered(policy)
        # Asked for at time 4: at the third call since then it goes on with its fourth row.
        assert drive(policy, range(7, 8)) == [[4, 3]]
    assert first.tolist() == [0, 6]
    begun, asked = server.asked[:2]
    assert not {"previous_actions", "inference_delay", "execution_horizon"} & begun.keys()
    assert (asked["time"], asked["inference_delay"], asked["execution_horizon"]) == (4, 2, 4)
    np.testing.assert_array_equal(asked["previous_actions"], [[0, step] for step in range(HORIZON)])
    assert server.is_closed


def test_the_longest_of_the_last_latencies_counts():
    server = Server()
    with make(server, execution_horizon=1) as policy:
        server.latency = 0.25
        drive(policy, range(1))
        server.latency = 0.0625
        for time in range(1, 60):
            drive(policy, range(time, time + 1))
            if policy._next is not None:
                answered(policy)
            if len(server.asked) <= 10:
                assert policy.delay == 3
        assert policy.delay == 1
    # Whatever the horizon, no less is carried out than the delay, for the next request's delay must fit.
    assert all(ask["execution_horizon"] >= ask["inference_delay"] for ask in server.asked[1:])


def test_a_chunk_that_is_used_up_waits_for_the_next():
    server = Server()
    with make(server) as policy:
        drive(policy, range(4))
        server.may_answer.clear()
        assert drive(policy, range(4, HORIZON)) == [[0, step] for step in range(4, HORIZON)]
        threading.Timer(0.05, server.may_answer.set).start()
        assert drive(policy, range(HORIZON, HORIZON + 1)) == [[4, HORIZON - 4]]
        assert len(server.asked) == 2


def test_a_delay_as_long_as_what_is_left_is_no_longer():
    server = Server()
    server.latency = 0.8
    with make(server) as policy:
        drive(policy, range(9))
        answered(policy)
    assert (server.asked[1]["execution_horizon"], server.asked[1]["inference_delay"]) == (8, 2)


def test_what_failed_in_the_background_is_asked_for_again():
    server = Server()
    with make(server) as policy:
        drive(policy, range(4))
        server.error = RuntimeError("gone")
        drive(policy, range(4, 5))
        answered(policy)
        server.error = None
        assert drive(policy, range(5, 6)) == [[0, 5]]
        answered(policy)
        assert drive(policy, range(6, 7)) == [[5, 1]]
        server.error = RuntimeError("gone for good")
        with pytest.raises(RuntimeError, match="gone for good"):
            drive(policy, range(7, 30))


def test_another_prompt_begins_afresh():
    server = Server()
    with make(server) as policy:
        drive(policy, range(3), prompt="a")
        assert drive(policy, range(3, 4), prompt="b") == [[3, 0]]
        policy.reset()
        assert drive(policy, range(4, 5), prompt="b") == [[4, 0]]
    assert all("previous_actions" not in ask for ask in server.asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control_hz": 0}, "control_hz: 0; a positive"),
        ({"control_hz": float("inf")}, "control_hz: inf"),
        ({"execution_horizon": 0}, "execution_horizon: 0; at least 1"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(Server(), **options)


def test_a_server_that_continues_no_chunks_is_refused_at_once():
    with pytest.raises(FailedPreconditionError, match=r"action\.real_time_chunking is off"):
        make(Server(""))


def test_the_fields_go_out_over_grpc(server):
    server.real_time_chunking = "guided"
    with RealTimePolicy(
        GrpcPolicy("127.0.0.1", server.port), control_hz=10, execution_horizon=1, clock=lambda: 0.0
    ) as policy:
        policy.infer({"prompt": "go"})
        policy.infer({"prompt": "go"})
        answered(policy)
    begun, continued = (received.request for received in server.received)
    assert not begun.HasField("previous_actions")
    assert (continued.inference_delay, continued.execution_horizon) == (0, 1)
    assert continued.HasField("inference_delay")
    assert list(continued.previous_actions.shape) == [2, 3]
    assert not continued.observation.tensors
