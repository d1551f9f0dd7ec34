"""`openpi-flash demo`: the main job in one command, on any machine."""

import argparse
import json
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from openpi_flash_cli.scene import camera_picture
from openpi_flash_cli.serve import serving

if TYPE_CHECKING:
    from openpi_flash_cli.tiny import TinyPolicy

STARTUP_TIMEOUT_S = 180.0
CONTROL_HZ = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calls", type=int, default=20, help="action chunks to ask for (%(default)s)")
    parser.add_argument(
        "--dir", type=Path, help="keep the checkpoint and the settings here (default: a temporary folder)"
    )


def run(arguments: argparse.Namespace) -> int:
    console = Console(stderr=False)
    with tempfile.TemporaryDirectory(prefix="openpi-flash-demo-") as temporary:
        directory = arguments.dir or Path(temporary)
        console.print("[bold]1. A tiny random pi0.5 checkpoint in openpi's layout")
        settings_file, grpc_port = write_settings(directory)
        console.print(f"   {settings_file}")
        console.print("[bold]2. openpi-flash serve --config settings.json")
        with serving(settings_file):
            drive(console, grpc_port, arguments.calls)
    return 0


def write_settings(directory: Path) -> tuple[Path, int]:
    """Makes the checkpoint and the settings that serve it on free ports of loopback.

    Returns:
        The settings file, and the gateway's gRPC port.
    """
    from openpi_flash_cli.tiny import make_tiny_policy

    settings = small_settings(make_tiny_policy(directory), directory)
    path = directory / "settings.json"
    path.write_text(json.dumps(settings, indent=2) + "\n")
    return path, settings["gateway"]["grpc_port"]


def small_settings(tiny: "TinyPolicy", directory: Path) -> dict[str, Any]:
    """Settings of a tiny policy on free ports of loopback, warm after one shape.

    Args:
        directory: for the edge's socket.
    """
    grpc_port, action_port, websocket_port, quic_port = free_ports(4)
    return {
        "action": {
            "model_config_name": str(tiny.policy_file),
            "checkpoint_dir": str(tiny.checkpoint_dir),
            "precision": "float32",
            "max_batch_size": 1,
            "warm_up": {"prompt_buckets": [64]},
            "grpc_port": action_port,
        },
        "action_transport": {
            "websocket_port": websocket_port,
            "quic_port": quic_port,  # free for TCP, and so most likely for UDP
            "unix_socket_path": str(directory / "action.sock"),
        },
        "gateway": {"host": "127.0.0.1", "grpc_port": grpc_port, "admin": None},
    }


def drive(console: Console, grpc_port: int, calls: int) -> None:
    """Plays the robot: pictures and joint angles out, action chunks in, then a table of where the time went."""
    import numpy as np
    from openpi_flash_client import GrpcPolicy

    with GrpcPolicy("127.0.0.1", grpc_port, connect_timeout_s=STARTUP_TIMEOUT_S, timeout_s=60) as policy:
        metadata = policy.get_server_metadata()
        console.print(f"[bold]3. {metadata['model_config_name']} on {metadata['backend']}, driven at {CONTROL_HZ} Hz")
        sizes = {spec["path"]: {"height": spec["height"], "width": spec["width"]} for spec in metadata["image_specs"]}
        splits: list[dict[str, float]] = []
        answer: dict[str, Any] = {}
        for step in range(calls):
            observation = {
                **{path: camera_picture(view, step, **size) for view, (path, size) in enumerate(sizes.items())},
                "observation/joint_position": 0.5 * np.sin(np.arange(7) + step / 10),
                "observation/gripper_position": np.array([0.5]),
                "prompt": "put the red block into the bowl",
            }
            started = time.perf_counter()
            answer = policy.infer(observation)
            round_trip_ms = (time.perf_counter() - started) * 1e3
            splits.append({"client round trip": round_trip_ms} | _split(answer))
            time.sleep(max(0.0, 1 / CONTROL_HZ - round_trip_ms / 1e3))
    actions = answer["actions"]
    console.print(f"   actions: {actions.shape} {actions.dtype}; first row {np.round(actions[0], 3).tolist()}")
    table = Table(title=f"where the time of {calls} calls went", title_justify="left")
    for heading in ("ms", "median", "max"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    for part in splits[0]:
        values = [split[part] for split in splits]
        table.add_row(part, f"{statistics.median(values):.2f}", f"{max(values):.2f}")
    console.print(table)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


def _split(answer: dict[str, Any]) -> dict[str, float]:
    timing = answer["timing"]
    return {part: timing[f"{part}_ms"] for part in ("queue", "preprocess", "model", "postprocess")}
