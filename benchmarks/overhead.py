"""Time outside the model: `infer()` minus the model, on loopback, beside openpi's own arrangement, in one run.

Arms, each called in turn in short blocks, so that a noisy moment of the machine hits all of them:
  openpi      openpi-client and a `websockets` server that calls the policy in its own process (stock/server.py)
  websocket   openpi-client and our gateway and action service
  grpc        openpi_flash_client.GrpcPolicy and our gateway and action service
The policy, the observation (three 224x224x3 uint8 cameras) and the machine are the same.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from openpi_flash_cli.demo import free_ports, serving
from openpi_flash_cli.scene import camera_picture
from openpi_flash_cli.tiny import TinyPolicy, make_tiny_policy
from openpi_flash_client import GrpcPolicy

HERE = Path(__file__).parent
STOCK_PYTHON = HERE.parent / ".cache/openpi-client-env/bin/python"
"""Interpreter of an environment with openpi-client and nothing of openpi-flash; `make bench-overhead` makes it."""
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
TARGET_GRPC_P50_MS = 2.5

Arm = Callable[[int], list[list[float]]]
"""Makes so many calls; returns [round trip, model] in ms for each."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--calls", type=int, default=20, help="calls of each arm in a block (%(default)s)")
    parser.add_argument("--backend", choices=("jax", "torch"), default="torch")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="opf-") as temporary, ExitStack() as stack:
        directory = Path(temporary)
        tiny = make_tiny_policy(directory, robot="aloha", layout=arguments.backend)
        arms = start_arms(stack, directory, tiny)
        for arm in arms.values():
            arm(20)  # warm-up
        calls: dict[str, list[list[float]]] = {name: [] for name in arms}
        for _ in range(arguments.blocks):
            for name, arm in arms.items():
                calls[name] += arm(arguments.calls)
    figures = {name: summarize(np.array(measured)) for name, measured in calls.items()}
    report(figures, arguments.backend, len(calls["grpc"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def start_arms(stack: ExitStack, directory: Path, tiny: TinyPolicy) -> dict[str, Arm]:
    stock_port, websocket_port, grpc_port, action_port = free_ports(4)
    settings = {
        "action": {
            "model_config_name": str(tiny.policy_file),
            "checkpoint_dir": str(tiny.checkpoint_dir),
            "precision": "float32",
            "device": "cpu",
            "max_batch_size": 1,
            "warm_up": {"prompt_buckets": [128]},
            "grpc_port": action_port,
        },
        "action_transport": {"websocket_port": websocket_port, "unix_socket_path": str(directory / "s")},
        "gateway": {"host": "127.0.0.1", "grpc_port": grpc_port},
    }
    path = directory / "settings.json"
    path.write_text(json.dumps(settings))
    stack.enter_context(serving(path))
    stack.enter_context(stock_server(tiny, stock_port))
    rng = np.random.default_rng(0)
    pictures = {
        name: np.ascontiguousarray(camera_picture(i, 0, height=224, width=224).transpose(2, 0, 1))
        for i, name in enumerate(CAMERAS)
    }
    state = rng.uniform(-0.5, 0.5, 14)
    np.savez(directory / "observation.npz", state=state, **pictures)
    client = stack.enter_context(GrpcPolicy("127.0.0.1", grpc_port, connect_timeout_s=180))
    observation = {"state": state, "images": pictures, "prompt": "fold the towel"}
    return {
        "openpi": stack.enter_context(stock_client(stock_port, directory)),
        "websocket": stack.enter_context(stock_client(websocket_port, directory)),
        "grpc": lambda count: [time_call(client, observation) for _ in range(count)],
    }


def time_call(client: GrpcPolicy, observation: dict) -> list[float]:
    started = time.perf_counter()
    answer = client.infer(observation)
    return [(time.perf_counter() - started) * 1e3, answer["policy_timing"]["infer_ms"]]


@contextmanager
def stock_server(tiny: TinyPolicy, port: int) -> Iterator[None]:
    command = [sys.executable, HERE / "stock" / "server.py", tiny.policy_file, tiny.checkpoint_dir, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", "the rival's server did not start"
            yield
        finally:
            process.terminate()


@contextmanager
def stock_client(port: int, directory: Path) -> Iterator[Arm]:
    command = [STOCK_PYTHON, HERE / "stock" / "client.py", str(port), directory / "observation.npz"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def call(count: int) -> list[list[float]]:
            assert process.stdin is not None
            assert process.stdout is not None
            print(count, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        try:
            yield call
        finally:
            process.terminate()


def summarize(calls: np.ndarray) -> dict[str, float]:
    outside = calls[:, 0] - calls[:, 1]
    figures = {f"p{q}": float(np.percentile(outside, q)) for q in (50, 95, 99)}
    return figures | {"model_p50": float(np.median(calls[:, 1]))}


def report(figures: dict[str, dict[str, float]], backend: str, count: int) -> None:
    print(f"time outside the model per request, ms; {backend} backend, {count} calls an arm, interleaved")
    print(f"{'':10} {'p50':>7} {'p95':>7} {'p99':>7} {'p50 / openpi':>13} {'model p50':>10}")
    for name, of in figures.items():
        ratio = of["p50"] / figures["openpi"]["p50"]
        print(f"{name:10} {of['p50']:7.2f} {of['p95']:7.2f} {of['p99']:7.2f} {ratio:13.2f} {of['model_p50']:10.2f}")
    verdict = "met" if figures["grpc"]["p50"] <= TARGET_GRPC_P50_MS else "missed"
    print(f"target, grpc p50 <= {TARGET_GRPC_P50_MS} ms: {verdict}")


if __name__ == "__main__":
    sys.exit(main())
