"""A robot and a TCP flow on one link: what each gets, and how long the robot waits; with a deep and a shallow buffer.

The flow is one TCP cubic connection that is never short of data, in the direction of the robot's observations.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.link.contenders import MODEL_PICTURES, Contender, Photographs, Robot, start_servers
from benchmarks.link.link import Link, Namespace, Network
from benchmarks.link.table import IDLE_PERIOD_S, TRAFFIC, p50_p99, say, table_head, table_row

PORT = "9000"
SETTLE_S = 2.0
PACES = {"busy": 0.0, "2 Hz": IDLE_PERIOD_S}


class Flow:
    """The rival flow; runs when it is started."""

    def __init__(self, robot: Namespace, server: Namespace, link: Link) -> None:
        self._robot, self._address = robot, link.server_address
        self._receiver = server.start(
            [sys.executable, TRAFFIC, "receive", PORT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._receiver.stdout is not None
        assert self._receiver.stdout.readline() == "ready\n"

    def start(self) -> None:
        self._sender = self._robot.start([sys.executable, TRAFFIC, "send", self._address, PORT])
        time.sleep(SETTLE_S)

    def stop(self) -> None:
        self._sender.terminate()
        self._sender.wait()
        time.sleep(SETTLE_S / 4)  # until the link is empty

    def mark(self) -> None:
        """Counts from now."""
        self._bytes()
        self._since = time.monotonic()

    def mbit(self) -> float:
        """Mbit/s of data since the mark."""
        return self._bytes() * 8 / (time.monotonic() - self._since) / 1e6

    def _bytes(self) -> int:
        assert self._receiver.stdin is not None
        assert self._receiver.stdout is not None
        print(file=self._receiver.stdin, flush=True)
        return int(self._receiver.stdout.readline())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rtt-ms", type=float, default=20, help="(%(default)s)")
    parser.add_argument("--rate-mbit", type=float, default=100, help="(%(default)s)")
    parser.add_argument("--buffers-ms", type=float, nargs="+", default=[10, 100], help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(%(default)s)")


def run(
    network: Network, directory: Path, contenders: Sequence[Contender], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """
    Returns:
        All figures, and the table in Markdown.
    """
    seconds = len(arguments.buffers_ms) * arguments.rounds * (1 + 4 * len(contenders)) * (arguments.seconds + SETTLE_S)
    say(f"at most about {seconds / 60:.0f} minutes")
    server, robot_namespace = network.namespace("server"), network.namespace("robot")
    link = network.link(robot_namespace, server)
    start_servers(server, directory, contenders)
    photographs = Photographs(directory)
    robots = {contender: Robot(contender, robot_namespace, link, photographs) for contender in contenders}
    for robot in robots.values():
        robot.wait_ready()
    flow = Flow(robot_namespace, server, link)
    link.set(rtt_ms=arguments.rtt_ms, rate_mbit=arguments.rate_mbit)
    figures: list[dict[str, Any]] = []
    for buffer_ms in arguments.buffers_ms:
        link.set(buffer_ms=buffer_ms, seed=1)
        for number in range(arguments.rounds):
            say(f"buffer {buffer_ms:g} ms, round {number + 1}")
            flow.start()
            flow.mark()
            time.sleep(arguments.seconds)
            flow_alone_mbit = flow.mbit()
            flow.stop()
            for contender, robot in robots.items():
                for pace, period_s in PACES.items():
                    alone, together = (
                        measure(
                            robot,
                            contender,
                            photographs,
                            link,
                            flow=rival,
                            period_s=period_s,
                            seconds=arguments.seconds,
                        )
                        for rival in (None, flow)
                    )
                    which = {"buffer_ms": buffer_ms, "contender": contender.name, "pace": pace}
                    both = {"robot_alone": alone, "together": together}
                    figures.append({**which, "flow_alone_mbit": flow_alone_mbit, **both})
    return {"fairness": figures}, report(figures, arguments)


def measure(
    robot: Robot,
    contender: Contender,
    photographs: Photographs,
    link: Link,
    *,
    flow: Flow | None,
    period_s: float,
    seconds: float,
) -> dict[str, Any]:
    """Calls for so long, beside the flow or alone."""
    robot.connect(1, MODEL_PICTURES)
    if flow:
        flow.start()
        flow.mark()
    link.statistics()
    answer = robot.calls(1_000_000, MODEL_PICTURES, period_s=period_s, limit_s=seconds)
    told = link.statistics()["server"]
    flow_mbit = 0.0
    if flow:
        flow_mbit = flow.mbit()
        flow.stop()
    sent_bytes = len(answer["ms"]) * photographs.sent_bytes(MODEL_PICTURES, contender)
    return {
        **answer,
        "robot_mbit": sent_bytes * 8 / answer["seconds"] / 1e6,
        "flow_mbit": flow_mbit,
        "link_bytes": told["received_bytes"] / max(1, sent_bytes),
        "dropped_share": told["dropped"] / max(1, told["received"]),
    }


def report(figures: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    lines = [
        f"{arguments.rtt_ms:g} ms round trip, {arguments.rate_mbit:g} Mbit/s; means of {arguments.rounds} rounds",
        "",
    ]
    lines += table_head(
        "buffer", "contender", "pace", "alone, ms p50 / p99", "bytes on link / sent", "dropped, %",
        "beside TCP, ms p50 / p99", "robot, Mbit/s", "TCP, Mbit/s", "TCP alone", "dropped of both, %", "errors",
    )  # fmt: skip
    for buffer_ms, contender, pace in dict.fromkeys((f["buffer_ms"], f["contender"], f["pace"]) for f in figures):
        of = [f for f in figures if (f["buffer_ms"], f["contender"], f["pace"]) == (buffer_ms, contender, pace)]
        alone, together = [f["robot_alone"] for f in of], [f["together"] for f in of]
        alone_shown = (
            p50_p99([ms for one in alone for ms in one["ms"]]),
            f"{mean(alone, 'link_bytes'):.2f}",
            f"{mean(alone, 'dropped_share') * 100:.2f}",
        )
        together_shown = (
            p50_p99([ms for one in together for ms in one["ms"]]),
            f"{mean(together, 'robot_mbit'):.1f}",
            f"{mean(together, 'flow_mbit'):.1f}",
            f"{mean(of, 'flow_alone_mbit'):.1f}",
            f"{mean(together, 'dropped_share') * 100:.2f}",
        )
        errors = sum(len(one["errors"]) for one in alone + together)
        lines.append(table_row(f"{buffer_ms:g} ms", contender, pace, *alone_shown, *together_shown, str(errors)))
    return lines


def mean(of: Sequence[dict[str, Any]], name: str) -> float:
    return sum(one[name] for one in of) / len(of)
