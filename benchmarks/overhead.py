"""Time outside the model: `infer()` minus the model, on loopback, beside openpi's own arrangement, in one run.

Arms, each called in turn in short blocks, so that a noisy moment of the machine hits all of them:
  openpi      openpi-client and a `websockets` server that calls the policy in its own process (stock/server.py)
  websocket   openpi-client and our gateway and action service
  grpc        openpi_flash_client.GrpcPolicy and our gateway and action service
  quic        openpi_flash_client.FlashTransportPolicy, our edge, and the same gateway and action service
The policy, the observation (three 224x224x3 uint8 cameras) and the machine are the same. Measured twice: with a model
that answers at once, and with a tiny one that takes the processor, and its caches, between any two requests, as a model
on an accelerator would not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from openpi_flash_cli.demo import free_ports
from openpi_flash_cli.edge import edge_program, find_binary
from openpi_flash_cli.scene import camera_picture
from openpi_flash_cli.tiny import make_tiny_policy
from openpi_flash_client import FlashTransportPolicy, GrpcPolicy
from openpi_flash_common.settings import EngineSettings
from processes import running

HERE = Path(__file__).parent
STOCK_PYTHON = HERE.parent / ".cache/openpi-client-env/bin/python"
"""Interpreter of an environment with openpi-client and nothing of openpi-flash; `make bench-overhead` makes it."""
CAMERAS = ("top", "left", "right")
TARGET_GRPC_P50_MS = 2.5
PROMPT = "fold the towel"
NUM_STEPS = 1
MODELS = {"instant": "a model that answers at once", "tiny": "a tiny model on the same processor"}

PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

Arm = Callable[[int], list[list[float]]]
"""Makes so many calls; returns [round trip, model] in ms for each."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--calls", type=int, default=20, help="calls of each arm in a block (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    figures = {model: measure(model, arguments.blocks, arguments.calls) for model in MODELS}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    verdict = "met" if figures["instant"]["grpc"]["p50"] <= TARGET_GRPC_P50_MS else "missed"
    print(f"target, grpc with the instant model, p50 <= {TARGET_GRPC_P50_MS} ms: {verdict}")
    return 0


def measure(model: str, blocks: int, calls: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="opf-") as temporary, ExitStack() as stack:
        arms = start_arms(stack, Path(temporary), model)
        for arm in arms.values():
            arm(2 * calls)  # warm-up
        measured: dict[str, list[list[float]]] = {name: [] for name in arms}
        for _ in range(blocks):
            for name, arm in arms.items():
                measured[name] += arm(calls)
    figures = {name: summarize(np.array(of)) for name, of in measured.items()}
    report(model, figures, blocks * calls)
    return figures


def start_arms(stack: ExitStack, directory: Path, model: str) -> dict[str, Arm]:
    tiny = make_tiny_policy(directory, robot="three_cameras", layout="torch")
    stock_port, websocket_port, grpc_port, action_port, quic_port = free_ports(5)
    settings = {
        "action": {
            "model_config_name": str(tiny.policy_file),
            "checkpoint_dir": str(tiny.checkpoint_dir),
            "precision": "float32",
            "device": "cpu",
            "num_steps": NUM_STEPS,
            "max_batch_size": 1,
            "grpc_port": action_port,
        },
        "action_transport": {
            "websocket_port": websocket_port,
            "quic_port": quic_port,
            "unix_socket_path": str(directory / "s"),
        },
        "gateway": {"host": "127.0.0.1", "grpc_port": grpc_port, "admin": None},
        "log": {"level": "error"},
    }
    path = directory / "settings.json"
    path.write_text(json.dumps(settings))
    action = [HERE / "instant.py"] if model == "instant" else ["-m", "openpi_flash_action"]
    for program in (action, ["-m", "openpi_flash_gateway"]):
        stack.enter_context(running([sys.executable, *program, "--config", path]))
    binary = find_binary()
    assert binary is not None, "`make install` brings the edge"
    edge = edge_program(EngineSettings.model_validate(settings), binary, directory).argv
    stack.enter_context(running([*edge, "--state-dir", directory, "--log-level", "error"]))
    arguments = [tiny.policy_file, tiny.checkpoint_dir, str(stock_port), str(NUM_STEPS), model]
    server = stack.enter_context(running([sys.executable, HERE / "stock" / "server.py", *arguments], **PIPES))
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n", "the rival's server did not start"
    observation = {name: camera_picture(i, 0, height=224, width=224) for i, name in enumerate(CAMERAS)}
    observation["state"] = np.linspace(-0.5, 0.5, 8)
    np.savez(directory / "observation.npz", **observation)
    observation = {**observation, "prompt": PROMPT}
    grpc = stack.enter_context(GrpcPolicy("127.0.0.1", grpc_port, connect_timeout_s=180))
    quic = stack.enter_context(
        FlashTransportPolicy("127.0.0.1", quic_port, insecure_skip_verify=True, connect_timeout_s=180)
    )
    return {
        "openpi": stock_client(stack, stock_port, directory),
        "websocket": stock_client(stack, websocket_port, directory),
        "grpc": lambda count: [time_call(grpc, observation) for _ in range(count)],
        "quic": lambda count: [time_call(quic, observation) for _ in range(count)],
    }


def time_call(client: GrpcPolicy | FlashTransportPolicy, observation: dict) -> list[float]:
    started = time.perf_counter()
    answer = client.infer(observation)
    return [(time.perf_counter() - started) * 1e3, answer["policy_timing"]["infer_ms"]]


def stock_client(stack: ExitStack, port: int, directory: Path) -> Arm:
    script = HERE / "stock" / "client.py"
    command = [STOCK_PYTHON, script, str(port), directory / "observation.npz", PROMPT]
    process = stack.enter_context(running(command, **PIPES))

    def call(count: int) -> list[list[float]]:
        assert process.stdin is not None
        assert process.stdout is not None
        print(count, file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    return call


def summarize(calls: np.ndarray) -> dict[str, float]:
    outside = calls[:, 0] - calls[:, 1]
    figures = {f"p{q}": float(np.percentile(outside, q)) for q in (50, 95, 99)}
    return figures | {"model_p50": float(np.median(calls[:, 1]))}


def report(model: str, figures: dict[str, dict[str, float]], count: int) -> None:
    print(f"{MODELS[model]}; {count} calls of each, in turn; ms outside the model")
    print(f"{'':10} {'p50':>7} {'p95':>7} {'p99':>7} {'p50 / openpi':>13} {'model p50':>10}")
    for name, of in figures.items():
        ratio = of["p50"] / figures["openpi"]["p50"]
        print(f"{name:10} {of['p50']:7.2f} {of['p95']:7.2f} {of['p99']:7.2f} {ratio:13.2f} {of['model_p50']:10.2f}")


if __name__ == "__main__":
    sys.exit(main())
