"""Time without answers when a part of the server is killed: robots back to back on every transport, on loopback.

One `openpi-flash serve` with a tiny policy, and three robots that call it all the time: openpi-client over WebSocket
(stock/steady.py), GrpcPolicy, and FlashTransportPolicy over QUIC. In turn nothing, the edge, the gateway, and `serve`
with all that it runs are killed by SIGKILL. `serve` starts the edge and the gateway again; `serve` itself is started
again at once. For each robot: its longest time without an answer, how much of that nothing listened on its port, how
much of it passed before the server was ready (started, loaded, and warm), and whether it went on with the same client.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from openpi_flash_cli.scene import camera_picture
from openpi_flash_cli.tiny import make_tiny_policy
from openpi_flash_client import FlashTransportPolicy, GrpcPolicy, PolicyError

from tests.support import READY, Engine, start_engine, start_engine_again

HERE = Path(__file__).parent
STOCK_PYTHON = HERE.parent / ".cache/openpi-client-env/bin/python"
"""Interpreter of an environment with openpi-client and nothing of openpi-flash; `make bench-restart` makes it."""
FAULTS = ("nothing", "edge", "gateway", "server")
CALLS = 50
"""Answers that every robot gets before and after each fault."""
TIMEOUT_S = 180.0
SAMPLE_S = 0.005
PAUSE_S = 0.02
"""Of a robot after a call that failed at once."""
PROMPT = "fold the towel"

Span = tuple[float, float]
"""Two moments of `time.monotonic`, which on Linux all processes share."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    figures = measure()
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    report(figures)
    return 0


def measure() -> dict[str, dict[str, dict[str, Any]]]:
    """Fault → transport → figures in seconds, failed calls, and whether a new client was needed."""
    with tempfile.TemporaryDirectory(prefix="opf-") as temporary, ExitStack() as stack:
        directory = Path(temporary)
        tiny = make_tiny_policy(directory, robot="three_cameras", layout="torch")
        engine = start_engine(tiny, directory, max_batch_size=1)

        def end() -> None:
            engine.kill()  # whichever runs then

        stack.callback(end)
        engine.wait_for(READY)
        robots = start_robots(stack, engine, directory)
        listening = Listening({name: robot.port for name, robot in robots.items()})
        stack.callback(listening.stop)
        figures = {}
        for fault in FAULTS:
            began = time.monotonic()
            wait_for_answers(robots, since=began)
            killed = time.monotonic()
            engine = kill(engine, fault)
            ready = time.monotonic()
            wait_for_answers(robots, since=ready)
            window, not_ready = (began, time.monotonic()), [(killed, ready)] if fault != "nothing" else []
            figures[fault] = {
                name: robot.figures(window, listening.missing(name), not_ready) for name, robot in robots.items()
            }
    return figures


def kill(engine: Engine, fault: str) -> Engine:
    """Kills a part of the server, and returns the engine when that part is ready again."""
    if fault == "edge":
        count = engine.count("edge.*listening")
        os.kill(engine.child_pid("openpi-flash-transport"), signal.SIGKILL)
        engine.wait_for("edge.*listening", count=count + 1)
    elif fault == "gateway":
        count = engine.count(READY)
        os.kill(engine.child_pid("openpi_flash_gateway"), signal.SIGKILL)
        engine.wait_for(READY, count=count + 1)
    elif fault == "server":
        engine.kill()
        engine = start_engine_again(engine, {})
        engine.wait_for(READY)
    return engine


class Robot:
    """What has happened to a robot, moment by moment.

    Attributes:
        port: that it calls.
        answers, failures, new_clients: moments of each.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: list[float] = []
        self.failures: list[float] = []
        self.new_clients: list[float] = []

    def figures(self, window: Span, not_listening: Sequence[Span], not_ready: Sequence[Span]) -> dict[str, Any]:
        gap = longest_gap(self.answers, window)
        return {
            "without_answer_s": gap[1] - gap[0],
            "not_listening_s": overlap(gap, not_listening),
            "not_ready_s": overlap(gap, not_ready),
            "failed_calls": sum(window[0] <= moment <= window[1] for moment in self.failures),
            "needs_new_client": any(window[0] <= moment <= window[1] for moment in self.new_clients),
        }


def longest_gap(answers: Sequence[float], window: Span) -> Span:
    """The longest span between two answers, in order, of a window; its ends count as answers."""
    moments = [window[0], *(moment for moment in answers if window[0] < moment < window[1]), window[1]]
    return max(itertools.pairwise(moments), key=lambda span: span[1] - span[0])


def overlap(span: Span, others: Sequence[Span]) -> float:
    """How much of a span lies in the others, which do not overlap."""
    return sum(max(0.0, min(span[1], end) - max(span[0], begin)) for begin, end in others)


def missing_spans(samples: Sequence[tuple[float, bool]]) -> list[Span]:
    """From each sample that found nothing to the next one that did, or to the last one."""
    spans: list[Span] = []
    since: float | None = None
    for moment, found in samples:
        if not found and since is None:
            since = moment
        elif found and since is not None:
            spans.append((since, moment))
            since = None
    return spans if since is None else [*spans, (since, samples[-1][0])]


class Listening:
    """Looks all the time whether something listens on each robot's port, TCP or UDP."""

    def __init__(self, ports: dict[str, int]) -> None:
        self._ports = ports
        self._samples: list[tuple[float, set[int]]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def missing(self, name: str) -> list[Span]:
        """When nothing listened on that robot's port."""
        return missing_spans([(moment, self._ports[name] in ports) for moment, ports in list(self._samples)])

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            self._samples.append((time.monotonic(), self._bound()))

    def _bound(self) -> set[int]:
        """Of this machine's sockets, those of TCP that listen (state 0A) and those of UDP that are bound (07)."""
        found = set()
        for protocol, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
            for line in Path(f"/proc/net/{protocol}").read_text().splitlines()[1:]:
                _, local, _, its_state, *_ = line.split()
                if its_state == state:
                    found.add(int(local.rpartition(":")[2], 16))
        return found


def start_robots(stack: ExitStack, engine: Engine, directory: Path) -> dict[str, Robot]:
    observation: dict[str, Any] = {
        name: camera_picture(view, 0, height=224, width=224) for view, name in enumerate(("top", "left", "right"))
    }
    observation["state"] = np.linspace(-0.5, 0.5, 8)
    np.savez(directory / "observation.npz", **observation)
    observation["prompt"] = PROMPT
    grpc = stack.enter_context(GrpcPolicy("127.0.0.1", engine.grpc_port))
    quic = stack.enter_context(engine.over_quic())
    robots = {
        "WebSocket, openpi-client": Robot(engine.websocket_port()),
        "gRPC": Robot(engine.grpc_port),
        "QUIC": Robot(engine.quic_port),
    }
    stock, of_grpc, of_quic = robots.values()
    script = [HERE / "stock/steady.py", str(stock.port), directory / "observation.npz", PROMPT]
    process = subprocess.Popen([STOCK_PYTHON, *script], stdout=subprocess.PIPE, text=True)
    stopped = threading.Event()
    targets: list[Callable[[], None]] = [
        lambda: follow_stock_client(process, stock),
        lambda: drive(grpc, observation, of_grpc, stopped),
        lambda: drive(quic, observation, of_quic, stopped),
    ]
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
        stack.callback(thread.join)
    stack.callback(stopped.set)
    stack.callback(process.kill)
    return robots


def drive(policy: GrpcPolicy | FlashTransportPolicy, observation: dict[str, Any], robot: Robot, stop: Any) -> None:
    while not stop.is_set():
        try:
            policy.infer(observation)
            robot.answers.append(time.monotonic())
        except PolicyError:
            robot.failures.append(time.monotonic())
            stop.wait(PAUSE_S)


def follow_stock_client(process: subprocess.Popen[str], robot: Robot) -> None:
    for line in process.stdout or ():
        event, moment = json.loads(line)
        {"answer": robot.answers, "failure": robot.failures, "new client": robot.new_clients}[event].append(moment)


def wait_for_answers(robots: dict[str, Robot], since: float) -> None:
    """Waits until every robot has had CALLS answers since a moment."""
    deadline = time.monotonic() + TIMEOUT_S
    for name, robot in robots.items():
        while sum(moment > since for moment in robot.answers[-CALLS:]) < CALLS:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: fewer than {CALLS} answers within {TIMEOUT_S:g} s")
            time.sleep(SAMPLE_S)


def report(figures: dict[str, dict[str, dict[str, Any]]]) -> None:
    print("longest time without an answer, s; three robots back to back, one tiny policy, loopback")
    columns = {"without_answer_s": "longest", "not_listening_s": "of it not listening", "not_ready_s": "not ready"}
    print(f"{'killed':8} {'robot':25} {' '.join(columns.values())} failed calls")
    for fault, robots in figures.items():
        for name, of in robots.items():
            seconds = [f"{of[column]:{len(heading)}.2f}" for column, heading in columns.items()]
            client = "needs a new client" if of["needs_new_client"] else ""
            print(f"{fault:8} {name:25} {' '.join(seconds)} {of['failed_calls']:12}  {client}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
