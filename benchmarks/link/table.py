"""Answer times by round trip, rate and loss: the first call after connecting, back to back, and twice a second."""

import argparse
import dataclasses
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.link.contenders import MODEL_PICTURES, Contender, Photographs, Robot, start_servers
from benchmarks.link.link import Link, Namespace, Network

TRAFFIC = Path(__file__).with_name("traffic.py")
CAMERA_PICTURES = "3x480x640"
LOSSES: dict[str, dict[str, float]] = {
    "none": {"loss": 0, "burst_every_ms": 0},
    "1%": {"loss": 1, "burst_every_ms": 0},
    "3%": {"loss": 3, "burst_every_ms": 0},
    "bursts": {"loss": 0, "burst_loss": 15, "burst_ms": 30, "burst_every_ms": 300},
}
"""Random in both directions; bursts: 15% for 30 ms, at random times, on average 300 ms apart."""
IDLE_PERIOD_S = 0.5
START_S, CONNECT_S = 30, 1
"""What starting everything, and a new connection with its first call, take, roughly."""
NONE = "-"
LATE_MS = 1.0
"""A link whose packets come later than this, at p99, is not the one that was asked for."""
CARRIED_SHARE = 0.95
"""Nor is one that carries less than this share of its rate."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A link, and what is sent over it.

    Attributes:
        loss: one of LOSSES.
        pictures: one of contenders.PICTURES.
        only_busy: whether nothing but calls back to back is measured.
    """

    rtt_ms: float
    rate_mbit: float
    loss: str = "none"
    pictures: str = MODEL_PICTURES
    only_busy: bool = False

    @property
    def name(self) -> str:
        return f"{self.rtt_ms:g} ms, {self.rate_mbit:g} Mbit/s, loss {self.loss}, {self.pictures}"

    def limit_ms(self, sent_bytes: int) -> float:
        """What physics allows."""
        return self.rtt_ms + sent_bytes * 8 / self.rate_mbit / 1e3


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured, for each contender on each link.

    Attributes:
        rounds: turns of each contender.
        first: new connections in a turn.
        idle: calls twice a second in a turn.
        settle: calls back to back in a turn that are not counted, until the connection has found its pace.
        busy: calls back to back in a turn, at most; busy_s: seconds that they take, at most; lossy_busy_s: the same
            where packets are lost, and calls may be slow.
    """

    settings: tuple[Setting, ...]
    rounds: int = 2
    first: int = 1
    idle: int = 3
    settle: int = 1
    busy: int = 40
    busy_s: float = 1.5
    lossy_busy_s: float = 2.5

    def firsts(self, setting: Setting) -> int:
        return 0 if setting.only_busy else self.first

    def idles(self, setting: Setting) -> int:
        return 0 if setting.only_busy else self.idle

    def seconds(self, setting: Setting) -> float:
        return self.busy_s if setting.loss == "none" else self.lossy_busy_s

    def minutes(self, contenders: int) -> float:
        """About what it takes."""
        turns = sum(
            self.firsts(setting) * CONNECT_S + self.idles(setting) * IDLE_PERIOD_S + self.settle + self.seconds(setting)
            for setting in self.settings
        )
        return (START_S + turns * self.rounds * contenders) / 60


QUICK = Plan(
    settings=(
        Setting(20, 100),
        *(Setting(20, 100, loss, only_busy=True) for loss in ("1%", "3%", "bursts")),
        *(Setting(20, 100, loss, CAMERA_PICTURES, only_busy=True) for loss in ("none", "1%")),
        Setting(80, 100),
    ),
    idle=2,
    busy_s=1.2,
    lossy_busy_s=1.8,
)
FULL = Plan(
    settings=(
        *(Setting(*link) for link in itertools.product((20, 10, 80), (100, 20, 1000), LOSSES)),
        *(Setting(20, 100, loss, CAMERA_PICTURES) for loss in LOSSES),
    ),
)


@dataclasses.dataclass
class Cell:
    """What one contender did on one link.

    Attributes:
        limit_ms: what physics allows.
        connect_ms, first_ms: of each new connection; busy_ms, idle_ms: of each call.
        errors: calls that failed, in words.
        link_bytes: put on the link towards the server, headers and repetitions included, for each byte of pictures.
        dropped: packets that a full buffer dropped, both directions.
        doubt: why the link was not what was asked for; None: it was.
    """

    setting: Setting
    contender: str
    limit_ms: float
    connect_ms: list[float] = dataclasses.field(default_factory=list)
    first_ms: list[float] = dataclasses.field(default_factory=list)
    busy_ms: list[float] = dataclasses.field(default_factory=list)
    idle_ms: list[float] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    link_bytes: float = 0.0
    dropped: float = 0.0
    late_p99_ms: float = 0.0
    doubt: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few links only, in about five minutes")
    parser.add_argument("--rounds", type=int, help=f"turns of each contender on each link ({FULL.rounds})")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no other link after so many minutes")


def run(
    network: Network, directory: Path, contenders: Sequence[Contender], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """
    Returns:
        All figures, and the tables in Markdown.
    """
    started = time.monotonic()
    plan = QUICK if arguments.quick else FULL
    if arguments.rounds:
        plan = dataclasses.replace(plan, rounds=arguments.rounds)
    say(f"{len(plan.settings)} links, {len(contenders)} contenders: about {plan.minutes(len(contenders)):.0f} minutes")
    server, robot = network.namespace("server"), network.namespace("robot")
    link = network.link(robot, server)
    start_servers(server, directory, contenders)
    photographs = Photographs(directory)
    robots = {contender: Robot(contender, robot, link, photographs) for contender in contenders}
    for one in robots.values():
        one.wait_ready()
    carried = {rate: carried_mbit(link, robot, server, rate) for rate in {s.rate_mbit for s in plan.settings}}
    cells = []
    for setting in plan.settings:
        say(setting.name)
        link.set(rtt_ms=setting.rtt_ms, rate_mbit=setting.rate_mbit, seed=1, **LOSSES[setting.loss])
        cells += measure(setting, plan, link, robots, photographs)
        if carried[setting.rate_mbit] < CARRIED_SHARE * setting.rate_mbit:
            for cell in cells[-len(robots) :]:
                cell.doubt = f"this machine carries {carried[setting.rate_mbit]:.0f} Mbit/s"
        if time.monotonic() - started > arguments.minutes * 60:
            say("no time for what follows")
            break
    minutes = (time.monotonic() - started) / 60
    say(f"took {minutes:.1f} minutes")
    figures = {"minutes": minutes, "carried_mbit": carried, "cells": [dataclasses.asdict(cell) for cell in cells]}
    return figures, [*summary(cells), "", *details(cells)]


def carried_mbit(link: Link, robot: Namespace, server: Namespace, rate_mbit: float) -> float:
    """What the emulator and this machine carry of that rate, sender and receiver of a TCP flow included."""
    link.set(rtt_ms=1, rate_mbit=rate_mbit)
    port = str(9000 + int(rate_mbit))
    receiver = server.start([sys.executable, TRAFFIC, "receive", port], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "ready\n"
    sender = robot.start([sys.executable, TRAFFIC, "send", link.server_address, port], stderr=subprocess.DEVNULL)
    time.sleep(1)  # until it fills the link
    link.statistics()
    started = time.monotonic()
    time.sleep(1)
    sent = link.statistics()["server"]["sent_bytes"]
    seconds = time.monotonic() - started
    for process in (sender, receiver):
        process.terminate()
        process.wait()
    return sent * 8 / seconds / 1e6


def measure(
    setting: Setting, plan: Plan, link: Link, robots: dict[Contender, Robot], photographs: Photographs
) -> list[Cell]:
    sent_bytes = {contender: photographs.sent_bytes(setting.pictures, contender) for contender in robots}
    cells = {c: Cell(setting, c.name, setting.limit_ms(sent_bytes[c])) for c in robots}
    link_bytes = dict.fromkeys(robots, 0.0)
    calls = dict.fromkeys(robots, 0)
    for robot in robots.values():
        robot.connect(1, setting.pictures)  # a window that another link has formed would tell of that one
    for _ in range(plan.rounds):
        for contender, robot in robots.items():
            cell = cells[contender]
            link.statistics()
            first = robot.connect(plan.firsts(setting), setting.pictures)
            idle = robot.calls(plan.idles(setting), setting.pictures, period_s=IDLE_PERIOD_S, offset_s=IDLE_PERIOD_S)
            settling = robot.calls(plan.settle, setting.pictures)
            busy = robot.calls(plan.busy, setting.pictures, limit_s=plan.seconds(setting))
            told = link.statistics()
            cell.connect_ms += first["connect_ms"]
            for series, answer in ((cell.first_ms, first), (cell.busy_ms, busy), (cell.idle_ms, idle)):
                series.extend(answer["ms"])
                cell.errors += answer["errors"]
            calls[contender] += sum(len(answer["ms"]) for answer in (first, idle, settling, busy))
            link_bytes[contender] += told["server"]["received_bytes"]
            cell.dropped += sum(told[to]["dropped"] for to in told)
            cell.late_p99_ms = max(cell.late_p99_ms, *(told[to]["late_p99_ms"] for to in told))
            if any(told[to]["overrun"] for to in told):
                cell.doubt = "the emulator was too slow to read every packet"
            elif cell.late_p99_ms > LATE_MS:
                cell.doubt = f"at p99 packets came more than {LATE_MS:g} ms after their time"
    for contender, cell in cells.items():
        cell.link_bytes = link_bytes[contender] / max(1, calls[contender] * sent_bytes[contender])
    return list(cells.values())


COLUMNS: dict[str, tuple[Setting, str]] = {
    "no loss, first call": (Setting(20, 100), "first_ms"),
    "no loss, busy": (Setting(20, 100), "busy_ms"),
    "no loss, 2 Hz": (Setting(20, 100), "idle_ms"),
    "1% loss": (Setting(20, 100, "1%"), "busy_ms"),
    "3% loss": (Setting(20, 100, "3%"), "busy_ms"),
    "bursts": (Setting(20, 100, "bursts"), "busy_ms"),
    "480x640, no loss": (Setting(20, 100, "none", CAMERA_PICTURES), "busy_ms"),
    "480x640, 1% loss": (Setting(20, 100, "1%", CAMERA_PICTURES), "busy_ms"),
}


def summary(cells: Sequence[Cell]) -> list[str]:
    """20 ms and 100 Mbit/s at one glance."""
    found = {(link_of(cell.setting), cell.contender): cell for cell in cells}
    lines = ["20 ms round trip, 100 Mbit/s, ms, p50 / p99 (the slowest, where there were fewer than 100 calls)", ""]
    lines += table_head("", *COLUMNS)
    limits: dict[tuple[str, ...], list[str]] = {}
    for contender in dict.fromkeys(cell.contender for cell in cells):
        of = [found.get((link_of(setting), contender)) for setting, _ in COLUMNS.values()]
        figures = [p50_p99(getattr(c, name)) if c else NONE for c, (_, name) in zip(of, COLUMNS.values(), strict=True)]
        lines.append(table_row(contender, *figures))
        limits.setdefault(tuple(f"*{cell.limit_ms:.0f}*" if cell else NONE for cell in of), []).append(contender)
    lines += [table_row(f"*physical limit of {', '.join(names)}*", *limit) for limit, names in limits.items()]
    return lines


def details(cells: Sequence[Cell]) -> list[str]:
    """Every link and contender."""
    lines = table_head(
        "link", "contender", "limit", "connect", "first call", "busy", "busy / limit", "2 Hz", "bytes on link / sent",
        "full buffer dropped", "calls", "errors",
    )  # fmt: skip
    doubts: dict[str, None] = {}
    for cell in cells:
        mark = ""
        if cell.doubt:
            doubts[cell.doubt] = None
            mark = "†" * (list(doubts).index(cell.doubt) + 1)
        ratio = f"{percentile(cell.busy_ms, 50) / cell.limit_ms:.2f}" if cell.busy_ms else NONE
        figures = [p50_p99(ms) for ms in (cell.connect_ms, cell.first_ms, cell.busy_ms)]
        calls = len(cell.first_ms) + len(cell.busy_ms) + len(cell.idle_ms)
        shown = (
            p50_p99(cell.idle_ms),
            f"{cell.link_bytes:.2f}",
            f"{cell.dropped:.0f}",
            str(calls),
            str(len(cell.errors)),
        )
        lines.append(
            table_row(cell.setting.name, cell.contender + mark, f"{cell.limit_ms:.1f}", *figures, ratio, *shown)
        )
    lines += ["", *(f"{'†' * (number + 1)} {doubt}" for number, doubt in enumerate(doubts))]
    return lines


def link_of(setting: Setting) -> Setting:
    return dataclasses.replace(setting, only_busy=False)


def p50_p99(ms: Sequence[float]) -> str:
    """Of fewer than 100 calls the second is the slowest."""
    if not ms:
        return NONE
    return f"{percentile(ms, 50):.1f} / {percentile(ms, 99):.1f}"


def percentile(ms: Sequence[float], percent: float) -> float:
    """One that was measured, not a mean of two."""
    return float(np.percentile(ms, percent, method="inverted_cdf"))


def table_head(*names: str) -> list[str]:
    return [table_row(*names), "|" + "---|" * len(names)]


def table_row(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
