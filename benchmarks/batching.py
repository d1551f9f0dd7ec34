"""Throughput and answer time of 1 to 16 robots that call one accelerator back to back, batched and one at a time.

Two servers on loopback, alike but for `action.max_batch_size`, are called in turn in short blocks. The accelerator is
one that takes a time for each batch and some more for each request in it, and no processor: by default what a full-size
pi0.5 is to take on an H200 (12, 30 and 55 ms for 1, 4 and 8 requests). `--random full` has random weights of that size
on the GPU that is here, or `--random tiny` on the processor.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from openpi_flash_cli.demo import free_ports
from openpi_flash_cli.scene import camera_picture
from openpi_flash_cli.tiny import make_tiny_policy
from openpi_flash_client import GrpcPolicy
from processes import running

SERVER = Path(__file__).parent / "batching_server.py"
ROBOTS = (1, 2, 4, 8, 16)
SETTLING_S = 0.5
"""Of a block, what is not counted: the robots begin at once, which they do not later."""
CAMERAS = ("top", "left", "right")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robots", nargs="+", type=int, default=ROBOTS, metavar="N")
    parser.add_argument("--max-batch-size", type=int, default=16, help="of the server that batches (%(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="of each number of robots at each server (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="of a block (%(default)s)")
    parser.add_argument("--fixed-ms", type=float, default=6, help="of a batch (%(default)s)")
    parser.add_argument("--per-request-ms", type=float, default=6.1, help="the same, for each request (%(default)s)")
    parser.add_argument("--random", choices=("full", "tiny"), help="a real model with random weights")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    figures = measure(arguments)
    report(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """For each number of robots what either server gave them: answers a second, p50 and p99 in ms."""
    with tempfile.TemporaryDirectory(prefix="opf-") as temporary, ExitStack() as stack:
        arms = {
            name: start(stack, Path(temporary) / name, max_batch_size, arguments)
            for name, max_batch_size in (("alone", 1), ("batched", arguments.max_batch_size))
        }
        times: dict[tuple[int, str], list[float]] = {(count, arm): [] for count in arguments.robots for arm in arms}
        for block in range(arguments.blocks + 1):
            for count in arguments.robots:
                for arm, robots in arms.items():
                    found = call_together(robots[:count], arguments.seconds)
                    if block:  # the first warms up
                        times[count, arm] += found
    seconds = arguments.blocks * (arguments.seconds - SETTLING_S)
    return [
        {"robots": count, **{arm: summarize(times[count, arm], seconds) for arm in arms}} for count in arguments.robots
    ]


def start(stack: ExitStack, directory: Path, max_batch_size: int, arguments: argparse.Namespace) -> list[GrpcPolicy]:
    """A server, and a connection for each robot."""
    tiny = make_tiny_policy(directory, robot="three_cameras", layout="torch")
    if arguments.random == "full":
        fields = json.loads(tiny.policy_file.read_text())
        tiny.policy_file.write_text(json.dumps({**fields, "model": {}}))
    grpc_port, action_port, websocket_port = free_ports(3)
    settings = {
        "action": {
            "model_config_name": str(tiny.policy_file),
            "checkpoint_dir": str(tiny.checkpoint_dir),
            "max_batch_size": max_batch_size,
            "grpc_port": action_port,
        },
        "action_transport": {"websocket_port": websocket_port, "unix_socket_path": str(directory / "s")},
        "gateway": {"host": "127.0.0.1", "grpc_port": grpc_port, "admin": None},
        "log": {"level": "error"},
    }
    path = directory / "settings.json"
    path.write_text(json.dumps(settings))
    model = f"sleep {arguments.fixed_ms} {arguments.per_request_ms}" if arguments.random is None else "random"
    for program in ([SERVER], ["-m", "openpi_flash_gateway"]):
        command = [sys.executable, *program, "--config", path]
        stack.enter_context(running(command, env={**os.environ, "BATCHING_MODEL": model}))
    robots = max(arguments.robots)
    return [stack.enter_context(GrpcPolicy("127.0.0.1", grpc_port, connect_timeout_s=600)) for _ in range(robots)]


def call_together(robots: list[GrpcPolicy], seconds: float) -> list[float]:
    """Every robot calls back to back; the round trips, in ms, of the answers that came in that time, once settled."""
    observation = {name: camera_picture(i, 0, height=224, width=224) for i, name in enumerate(CAMERAS)}
    observation |= {"state": np.linspace(-0.5, 0.5, 8), "prompt": "fold the towel"}
    found: list[list[float]] = [[] for _ in robots]
    begin = time.perf_counter()

    def drive(robot: GrpcPolicy, times: list[float]) -> None:
        ended = begin
        while ended < begin + seconds:
            started = time.perf_counter()
            robot.infer(observation)
            ended = time.perf_counter()
            if SETTLING_S <= ended - begin < seconds:
                times.append((ended - started) * 1e3)

    threads = [threading.Thread(target=drive, args=pair) for pair in zip(robots, found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [took for times in found for took in times]


def summarize(times_ms: list[float], seconds: float) -> dict[str, float]:
    return {
        "per_second": len(times_ms) / seconds,
        **{f"p{q}_ms": float(np.percentile(times_ms, q)) for q in (50, 99)},
        "calls": len(times_ms),
    }


def report(figures: list[dict[str, Any]]) -> None:
    print("robots   one at a time: per s    p50    p99   batched: per s    p50    p99   times as many")
    for row in figures:
        alone, batched = (
            f"{of['per_second']:6.1f} {of['p50_ms']:6.1f} {of['p99_ms']:6.1f}" for of in (row["alone"], row["batched"])
        )
        ratio = row["batched"]["per_second"] / row["alone"]["per_second"]
        print(f"{row['robots']:6} {'':15} {alone} {'':10} {batched} {ratio:15.2f}")


if __name__ == "__main__":
    sys.exit(main())
