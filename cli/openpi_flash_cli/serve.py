"""`openpi-flash serve`: the configured services, the gateway and the QUIC edge on this machine, supervised."""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openpi_flash_common.settings import EngineSettings, load_settings

from openpi_flash_cli.edge import BINARY, BINARY_VARIABLE, edge_program, find_binary
from openpi_flash_cli.supervisor import Program, Supervisor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, help="JSON file of settings (default: $INFERENCE_CONFIG_PATH); OPENPI_ variables win"
    )


def run(arguments: argparse.Namespace) -> int:
    """Checks the settings here, so that a mistake is said once and before anything starts, then supervises."""
    settings = load_settings(arguments.config)
    if arguments.config is not None:
        os.environ["INFERENCE_CONFIG_PATH"] = str(arguments.config.resolve())
    with tempfile.TemporaryDirectory(prefix="openpi-flash-") as private:
        return asyncio.run(Supervisor(programs(settings, Path(private))).run())


@contextmanager
def serving(settings_file: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `openpi-flash serve` in a process of its own, and stops it in order.

    Args:
        settings_file: None: as INFERENCE_CONFIG_PATH and the environment say.
    """
    command = [sys.executable, "-m", "openpi_flash_cli", "serve"]
    command += [] if settings_file is None else ["--config", str(settings_file)]
    process = subprocess.Popen(command)  # noqa: S603 - our own program
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def programs(settings: EngineSettings, directory: Path) -> list[Program]:
    """What has to run for these settings, in the order of starting.

    Args:
        directory: of this user alone, for what the programs are to read.
    """
    services = [service(name) for name in (*settings.slots, "gateway")]
    binary = find_binary()
    if binary is None:
        print(
            f"no {BINARY} on the path or beside this Python, and {BINARY_VARIABLE} is not set: QUIC is not served",
            file=sys.stderr,
        )
        return services
    return [*services, edge_program(settings, binary, directory)]


def service(name: str) -> Program:
    """One of the Python services, `action`, `planner` or `gateway`, which reads the settings itself."""
    return Program(name, (sys.executable, "-m", f"openpi_flash_{name}"))
