"""Real-time chunking through the whole engine: the fields reach the model on every transport, and chunks join."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from openpi_flash_cli.tiny import TinyPolicy
from openpi_flash_client import FlashTransportPolicy, GrpcPolicy, InvalidArgumentError, RealTimePolicy

from tests.support import Engine, ask, running_engine

SEED = 7
EXECUTED, DELAY = 4, 2


@pytest.fixture(scope="module", params=["jax", "torch"])
def engine(
    request: pytest.FixtureRequest, tiny_policies: dict[str, TinyPolicy], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp(f"realtime-{request.param}")
    with running_engine(tiny_policies[request.param], directory, max_batch_size=1, real_time_chunking=True) as engine:
        yield engine


def test_a_continued_chunk_is_the_same_on_every_transport(engine, observation):
    with GrpcPolicy("127.0.0.1", engine.grpc_port) as policy:
        previous = policy.infer(observation, seed=1)["actions"]
        afresh = policy.infer(observation, seed=SEED)["actions"]
        continued = observation | {
            "previous_actions": previous,
            "inference_delay": DELAY,
            "execution_horizon": EXECUTED,
        }
        expected = policy.infer(continued, seed=SEED)["actions"]
    with engine.over_quic() as policy:
        assert policy.infer(continued, seed=SEED)["actions"].tobytes() == expected.tobytes()
    with engine.over_websocket() as connection:
        assert ask(connection, {**continued, "seed": SEED})["actions"].tobytes() == expected.tobytes()
    assert apart(expected, previous) < 0.2 * apart(afresh, previous)


def test_what_cannot_be_continued_is_refused_by_name(engine, observation):
    with GrpcPolicy("127.0.0.1", engine.grpc_port) as policy:
        previous = policy.infer(observation, seed=1)["actions"]
        numbers = {"previous_actions": previous, "inference_delay": DELAY, "execution_horizon": EXECUTED}
        for name, value in (
            ("inference_delay", EXECUTED + 1),
            ("previous_actions", previous[:3]),
            ("execution_horizon", 0),
        ):
            with pytest.raises(InvalidArgumentError, match=name):
                policy.infer(observation | numbers | {name: value})


class Recorded:
    """Another policy, and what it was asked and has answered."""

    def __init__(self, policy: FlashTransportPolicy) -> None:
        self._policy = policy
        self.chunks: list[tuple[Mapping[str, Any], np.ndarray]] = []

    def infer(self, obs: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        answer = self._policy.infer(obs, **options)
        self.chunks.append((obs, answer["actions"]))
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


def test_a_robots_chunks_join(engine, observation):
    recorded = Recorded(engine.over_quic())
    ticks = itertools.count()  # a request takes one; the robot steps as fast as it can
    options = {"control_hz": DELAY, "execution_horizon": EXECUTED, "clock": lambda: next(ticks)}
    with RealTimePolicy(recorded, **options) as policy:
        while len(recorded.chunks) < 6:
            policy.infer(observation)
    (begun, _), *continued = recorded.chunks
    assert "previous_actions" not in begun
    for obs, chunk in continued:
        assert obs["inference_delay"] == DELAY
        assert apart(chunk, obs["previous_actions"], obs["execution_horizon"]) < 0.2 * np.abs(chunk).max()


def apart(chunk: np.ndarray, previous: np.ndarray, executed: int = EXECUTED) -> float:
    """The furthest that a chunk is from the one before in the steps that will be over when it is there."""
    return np.abs(chunk[:DELAY] - previous[executed : executed + DELAY]).max()
