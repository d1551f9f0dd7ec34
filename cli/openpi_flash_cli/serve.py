"""`openpi-flash serve`: the configured services and the gateway on this machine, supervised."""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from openpi_flash_common.settings import EngineSettings, load_settings

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
    return asyncio.run(Supervisor(programs(settings)).run())


def programs(settings: EngineSettings) -> list[Program]:
    """What has to run for these settings, in the order of starting."""
    return [Program(name, (sys.executable, "-m", f"openpi_flash_{name}")) for name in (*settings.slots, "gateway")]
