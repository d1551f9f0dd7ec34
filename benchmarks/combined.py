"""What a planner costs an action: round trips of combined mode in each cadence beside action-only, in one run.

One server, one robot, on loopback; `mode="action_only"` and combined mode in each cadence are called in turn in short
blocks, so that a noisy moment of the machine hits all of them. Action-only is sent the prompt that combined mode makes,
so that the model has the same to read. Two planners: one that takes a second and no processor,
as one on an accelerator of its own would, and a tiny one that shares the processor with everything else. The action
model is tiny, on the processor, too.
"""

import argparse
import json
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from openpi_flash_cli.demo import free_ports
from openpi_flash_cli.scene import camera_picture
from openpi_flash_cli.tiny import make_tiny_policy
from openpi_flash_client import GrpcPolicy
from processes import running

HERE = Path(__file__).parent
CADENCES: dict[str, Any] = {
    "every_request": "every_request",
    "interval 2 s": {"interval_ms": 2000},
    "background": "background",
}
ARMS = ("action only", *CADENCES)
PLANNERS = {"slow": "a planner that takes 1 s", "tiny": "a tiny planner on the same processor"}
TARGET_BACKGROUND = 1.05
PROMPT = "fold the towel"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--calls", type=int, default=25, help="calls of each arm in a block (%(default)s)")
    parser.add_argument("--slow-calls", type=int, default=1, help="the same, of every_request with the slow planner")
    parser.add_argument("--hz", type=float, default=20, help="calls a second (%(default)s); 0: back to back")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    figures = {}
    for planner, title in PLANNERS.items():
        figures[planner] = measure(planner, arguments)
        print(f"{title}; {arguments.hz:g} calls a second; round trip in ms")
        report(figures[planner])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(planner: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="opf-") as temporary, ExitStack() as stack:
        robot, admin_port = start(stack, Path(temporary), planner)
        pause_s = 1 / arguments.hz if arguments.hz else 0.0
        set_cadence(admin_port, "every_request")
        subtask = robot.infer(observe(PROMPT), mode="subtask_only")["subtask"]["text"]
        round_trips: dict[str, list[float]] = {arm: [] for arm in ARMS}
        statuses: dict[str, dict[str, int]] = {arm: {} for arm in ARMS}
        for block in range(arguments.blocks + 1):
            for arm in ARMS:
                slow = (planner, arm) == ("slow", "every_request")
                if arm in CADENCES:
                    set_cadence(admin_port, CADENCES[arm])
                observation = observe(PROMPT if arm in CADENCES else f"{PROMPT}. Subtask: {subtask}")
                mode = "default" if arm in CADENCES else "action_only"
                calls = call(robot, observation, mode, arguments.slow_calls if slow else arguments.calls, pause_s)
                if block:  # the first warms up
                    for round_trip_ms, status in calls:
                        round_trips[arm].append(round_trip_ms)
                        statuses[arm][status] = statuses[arm].get(status, 0) + 1
    return {
        arm: {**{f"p{q}": float(np.percentile(of, q)) for q in (50, 99)}, "calls": len(of), "subtasks": statuses[arm]}
        for arm, of in round_trips.items()
    }


def observe(prompt: str) -> dict[str, Any]:
    pictures = {name: camera_picture(i, 0, height=224, width=224) for i, name in enumerate(("top", "left", "right"))}
    return {**pictures, "state": np.linspace(-0.5, 0.5, 8), "prompt": prompt}


def call(
    robot: GrpcPolicy, observation: dict[str, Any], mode: str, count: int, pause_s: float
) -> list[tuple[float, str]]:
    """Round trip in ms, and what is said of the subtask, of each call."""
    calls = []
    for _ in range(count):
        started = time.perf_counter()
        answer = robot.infer(observation, mode=mode)
        took_s = time.perf_counter() - started
        calls.append((took_s * 1e3, answer.get("subtask", {}).get("status", "none")))
        time.sleep(max(0.0, pause_s - took_s))
    return calls


def set_cadence(admin_port: int, cadence: Any) -> None:
    body = json.dumps({"cadence": cadence}).encode()
    headers = {"Content-Type": "application/json"}
    url = f"http://127.0.0.1:{admin_port}/config"
    urllib.request.urlopen(urllib.request.Request(url, body, headers, method="PATCH")).close()


def start(stack: ExitStack, directory: Path, planner: str) -> tuple[GrpcPolicy, int]:
    tiny = make_tiny_policy(directory, robot="three_cameras")
    grpc_port, action_port, planner_port, websocket_port, planner_websocket_port, admin_port = free_ports(6)
    model = {
        "model_config_name": str(tiny.policy_file),
        "checkpoint_dir": str(tiny.checkpoint_dir),
        "precision": "float32",
        "device": "cpu",
        "max_batch_size": 1,
    }
    settings = {
        "action": {**model, "grpc_port": action_port},
        "planner": {**model, "grpc_port": planner_port},
        "action_transport": {"websocket_port": websocket_port, "unix_socket_path": str(directory / "a")},
        "planner_transport": {"websocket_port": planner_websocket_port, "unix_socket_path": str(directory / "p")},
        "gateway": {"host": "127.0.0.1", "grpc_port": grpc_port, "admin": {"port": admin_port}},
        "log": {"level": "error"},
    }
    path = directory / "settings.json"
    path.write_text(json.dumps(settings))
    program = [HERE / "slow_planner.py"] if planner == "slow" else ["-m", "openpi_flash_planner"]
    for arguments in (program, ["-m", "openpi_flash_action"], ["-m", "openpi_flash_gateway"]):
        stack.enter_context(running([sys.executable, *arguments, "--config", path]))
    return stack.enter_context(GrpcPolicy("127.0.0.1", grpc_port, connect_timeout_s=300)), admin_port


def report(figures: dict[str, dict[str, Any]]) -> None:
    print(f"{'':14} {'p50':>8} {'p99':>8} {'p50 / action only':>18} {'p99 / action only':>18} {'calls':>6}  subtasks")
    alone = figures["action only"]
    for arm, of in figures.items():
        ratios = "".join(f"{of[p] / alone[p]:19.3f}" for p in ("p50", "p99"))
        print(f"{arm:14} {of['p50']:8.2f} {of['p99']:8.2f}{ratios} {of['calls']:6}  {of['subtasks']}")
    verdict = "met" if figures["background"]["p50"] <= TARGET_BACKGROUND * alone["p50"] else "missed"
    print(f"target, p50 of background <= {TARGET_BACKGROUND} x action only: {verdict}\n")


if __name__ == "__main__":
    sys.exit(main())
