"""What the emulated link is asked for is what packets meet."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.link import link as link_module
from benchmarks.link.link import LinkError, Network
from tests.support import needs_links

TRAFFIC = Path(link_module.__file__).with_name("traffic.py")
PORT = "9000"

pytestmark = needs_links


class Pair:
    def __init__(self, network: Network) -> None:
        self.robot, self.server = network.namespace("robot"), network.namespace("server")
        self.link = network.link(self.robot, self.server)

    def ping(self, count: int, interval_ms: float) -> list[tuple[int, float]]:
        """[number, round trip in ms], in the order of the answers."""
        printed = self.robot.run(
            sys.executable, TRAFFIC, "ping", self.link.server_address, PORT, str(count), str(interval_ms)
        )
        return json.loads(printed)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Network() as network:
        pair = Pair(network)
        server = pair.server.start([sys.executable, TRAFFIC, "echo", PORT])
        while not pair.ping(1, 0):
            assert server.poll() is None
        yield pair


@pytest.mark.parametrize("rtt_ms", [0, 10, 80])
def test_round_trip_is_as_asked(pair: Pair, rtt_ms: float) -> None:
    pair.link.set(rtt_ms=rtt_ms)
    round_trips = [ms for _, ms in pair.ping(200, 2)]
    assert min(round_trips) >= rtt_ms
    assert statistics.median(round_trips) < rtt_ms + 0.5


@pytest.mark.parametrize(("conditions", "share"), [
    ({"loss": 3}, 0.03),
    ({"burst_loss": 50, "burst_ms": 10, "burst_every_ms": 10}, 0.25),
])  # fmt: skip
def test_loss_is_as_asked(pair: Pair, conditions: dict[str, float], share: float) -> None:
    count = 6000
    pair.link.set("server", seed=7, **conditions)
    pair.link.statistics()
    lost = count - len(pair.ping(count, 0.2))
    told = pair.link.statistics()
    assert told["server"]["lost"] == lost
    assert told["robot"]["lost"] == 0
    # Six standard deviations; losses in a burst go together, about so many packets of them.
    together = count * share / max(1, told["server"]["bursts"]) if "burst_ms" in conditions else 1
    assert abs(lost - count * share) < 6 * math.sqrt(count * share * (1 - share) * together)


@pytest.mark.parametrize("reorder", [0, 1])
def test_jitter_spreads_round_trips_and_reorders_only_when_asked(pair: Pair, reorder: int) -> None:
    pair.link.set(rtt_ms=20, jitter_ms=5, reorder=reorder)
    answered = pair.ping(400, 1)
    numbers = [number for number, _ in answered]
    assert min(ms for _, ms in answered) >= 10
    assert statistics.stdev(ms for _, ms in answered) > 0.5
    assert (numbers != sorted(numbers)) == reorder


@pytest.mark.parametrize("rate_mbit", [5, 50])
def test_rate_is_as_asked(pair: Pair, rate_mbit: float) -> None:
    pair.link.set(rate_mbit=rate_mbit)
    sink = pair.server.start([sys.executable, TRAFFIC, "sink", "9001"], stdout=subprocess.PIPE)
    assert sink.stdout is not None
    assert sink.stdout.readline() == "ready\n"
    pair.link.statistics()
    pair.robot.run(sys.executable, TRAFFIC, "flood", pair.link.server_address, "9001", str(rate_mbit * 1.5), "2")
    counted = json.loads(sink.stdout.readline())
    mbit = (counted["packets"] - 1) * 1500 * 8 / counted["seconds"] / 1e6
    assert mbit == pytest.approx(rate_mbit, rel=0.03)
    told = pair.link.statistics()["server"]
    assert told["dropped"] == told["received"] - counted["packets"] > 0


def test_a_full_buffer_delays_by_its_length_and_no_more(pair: Pair) -> None:
    pair.link.set(rate_mbit=5, buffer_ms=40)
    flood = pair.robot.start([sys.executable, TRAFFIC, "flood", pair.link.server_address, "9001", "20", "2"])
    round_trips = [ms for _, ms in pair.ping(100, 10)]
    flood.wait()
    assert 30 < statistics.median(round_trips) < 45


def test_tcp_is_cubic(pair: Pair) -> None:
    path = "/proc/sys/net/ipv4/tcp_congestion_control"
    assert pair.server.run("cat", path) == "cubic\n"
    assert pair.robot.run("cat", path) == "cubic\n"


def test_the_host_keeps_its_congestion_control_settings() -> None:
    paths = (Path("/proc/sys/net/ipv4/tcp_congestion_control"), link_module.ALLOWED_CONGESTION_CONTROL)
    before = [path.read_text() for path in paths]
    with Network() as network:
        network.namespace("robot")
        assert [path.read_text() for path in paths] == before


def test_nothing_is_left_afterwards() -> None:
    with pytest.raises(ZeroDivisionError), Network() as network:
        pair = Pair(network)
        process = pair.server.start(["sleep", "60"])
        names = [pair.robot.name, pair.server.name]
        assert set(names) <= _namespaces()
        raise ZeroDivisionError
    assert process.poll() is not None
    assert not set(names) & _namespaces()


def test_what_a_killed_run_left_is_removed_by_the_next_and_what_lives_is_not() -> None:
    program = f"""
import sys
sys.path.insert(0, {os.fspath(TRAFFIC.parents[2])!r})
from benchmarks.link.link import Network
with Network() as network:
    robot, server = network.namespace("robot"), network.namespace("server")
    network.link(robot, server)
    print(server.name, server.start(["sleep", "600"]).pid, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        name, pid = run.stdout.readline().split()
        with Network():
            assert name in _namespaces()
        run.send_signal(signal.SIGKILL)
    assert Path(f"/proc/{pid}").exists()
    with Network():
        assert name not in _namespaces()
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()  # its new parent may be late to bury it


def test_what_cannot_be_set_is_refused(pair: Pair) -> None:
    with pytest.raises(LinkError, match="no such condition: los"):
        pair.link.set(los=1)
    with pytest.raises(LinkError, match="loss=101"):
        pair.link.set(loss=101)
    with pytest.raises(LinkError, match="delay=-1"):
        pair.link.set(rtt_ms=-2)


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LinkError, match="need root"), Network():
        pass


def _namespaces() -> set[str]:
    return {path.name for path in Path("/run/netns").glob("*")}
