"""Many robots on one server: do one on a bad link and one that stalls slow the others down?

The two odd ones have links of their own. `healthy`: those links are good, too, and nobody stalls. `faulty`: one link
loses packets, and the robot on the other is stopped (SIGSTOP) in the middle of a call, until the turn is over. The
offered load is the same, but for the stopped robot's. The two take turns.
"""

import argparse
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.link.contenders import MODEL_PICTURES, Contender, Photographs, Robot, start_servers
from benchmarks.link.link import Network
from benchmarks.link.table import NONE, p50_p99, percentile, say, table_head, table_row

CALLS_BEFORE_STALL = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--robots", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--period-s", type=float, default=1.0, help="each robot's time between calls (%(default)s)")
    parser.add_argument("--rtt-ms", type=float, default=20, help="(%(default)s)")
    parser.add_argument("--rate-mbit", type=float, default=200, help="of the link that the others share (%(default)s)")
    parser.add_argument("--loss", type=float, default=3, help="percent, on the bad link (%(default)s)")
    parser.add_argument("--calls", type=int, default=20, help="of each robot in a turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="(%(default)s)")


def run(
    network: Network, directory: Path, contenders: Sequence[Contender], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """
    Returns:
        All figures, and the table in Markdown.
    """
    turn_s = (arguments.calls + 1) * arguments.period_s
    say(f"about {len(contenders) * (2 * arguments.rounds * turn_s + 15) / 60:.0f} minutes")
    server = network.namespace("server")
    namespaces = [network.namespace(name) for name in ("good", "lossy", "stalled")]
    links = [
        network.link(namespace, server, rtt_ms=arguments.rtt_ms, rate_mbit=arguments.rate_mbit)
        for namespace in namespaces
    ]
    lossy_link = links[1]
    start_servers(server, directory, contenders)
    photographs = Photographs(directory)
    figures: dict[str, Any] = {}
    for contender in contenders:
        say(contender.name)
        lossy, stalled, *others = (
            Robot(contender, namespaces[i], links[i], photographs) for i in (1, 2, *[0] * (arguments.robots - 2))
        )
        for robot in (lossy, stalled, *others):
            robot.wait_ready()
        turns: dict[str, dict[str, list[Any]]] = {
            state: {"others": [], "lossy": [], "errors": []} for state in ("healthy", "faulty")
        }
        for number in range(arguments.rounds):
            # In turn first, since TCP's windows drift from call to call.
            for state, taken in list(turns.items())[:: -1 if number % 2 else 1]:
                faulty = state == "faulty"
                lossy_link.set(loss=arguments.loss if faulty else 0, seed=1)
                answers = turn(lossy, stalled, others, arguments, stall=faulty)
                taken["lossy"] += answers[0]["ms"]
                # The first call follows a pause that is as long as the turn before took, and TCP is slow after pauses.
                taken["others"] += [ms for answer in answers[2:] for ms in answer["ms"][1:]]
                taken["errors"] += [error for answer in answers for error in answer["errors"]]
        for robot in (lossy, stalled, *others):
            robot.stop()
        figures[contender.name] = turns
    return {"robots": figures}, report(figures, arguments)


def turn(
    lossy: Robot, stalled: Robot, others: Sequence[Robot], arguments: argparse.Namespace, *, stall: bool
) -> list[dict[str, Any]]:
    """All make their calls, evenly apart; the answers of the lossy one, the stalled one, and the others."""
    robots = [lossy, stalled, *others]
    for place, robot in enumerate(robots):
        offset_s = place * arguments.period_s / len(robots)
        count = CALLS_BEFORE_STALL + 1 if stall and robot is stalled else arguments.calls
        robot.begin(count, MODEL_PICTURES, period_s=arguments.period_s, offset_s=offset_s)
    if stall:
        # A call has been on its way for half a round trip: part of it is there, the rest does not come.
        time.sleep(arguments.period_s * (CALLS_BEFORE_STALL + 1 / len(robots)) + arguments.rtt_ms / 2e3)
        os.kill(stalled.pid, signal.SIGSTOP)
    answers = {robot: robot.result() for robot in robots if robot is not stalled}
    if stall:
        os.kill(stalled.pid, signal.SIGCONT)
    answers[stalled] = stalled.result()
    return [answers[robot] for robot in robots]


def report(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    lines = [
        f"{arguments.robots} robots, a call every {arguments.period_s:g} s each; {arguments.rtt_ms:g} ms round trip, "
        f"{arguments.rate_mbit:g} Mbit/s; one with {arguments.loss:g}% loss and one stalled; ms, p50 / p99",
        "",
    ]
    lines += table_head(
        "contender", "others, all well", "others, two not", "p99 against all well", "the lossy one", "errors"
    )
    for name, turns in figures.items():
        well, ill = (turns[state]["others"] for state in ("healthy", "faulty"))
        change = f"{percentile(ill, 99) / percentile(well, 99) - 1:+.1%}" if well and ill else NONE
        errors = sum(len(of["errors"]) for of in turns.values())
        lines.append(
            table_row(name, p50_p99(well), p50_p99(ill), change, p50_p99(turns["faulty"]["lossy"]), str(errors))
        )
    return lines
