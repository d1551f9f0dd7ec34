"""The process of a service: its command line, its settings, its exit status."""

import argparse
import asyncio
import atexit
import gc
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from openpi_flash_common.logs import setup_logging
from openpi_flash_common.settings import EXIT_CONFIG, EngineSettings, SettingsError, load_settings
from openpi_flash_common.telemetry import Service

Errors = tuple[type[Exception], ...]


def run_service(
    service: Service,
    serve: Callable[[EngineSettings], Coroutine[Any, Any, None]],
    arguments: list[str] | None,
    *,
    unusable: Errors = (),
    transient: Errors = (),
) -> int:
    """Runs a service until SIGTERM; returns the exit status of its process.

    Args:
        serve: runs until it is to stop.
        arguments: of the command line; None: the process's own.
        unusable: errors that starting again would not help, as with SettingsError; told in a line.
        transient: errors, also among those, that may not happen the next time.
    """
    program = f"openpi-flash-{service}"
    told: Errors = (SettingsError, *unusable, *transient)
    parser = argparse.ArgumentParser(prog=program, description=f"Runs the {service} until SIGTERM.")
    parser.add_argument("--config", type=Path, help="settings file; default: the one that INFERENCE_CONFIG_PATH names")
    try:
        settings = load_settings(parser.parse_args(arguments).config)
        setup_logging(settings.log, service)
        asyncio.run(serve(settings))
    except told as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1 if isinstance(error, transient) else EXIT_CONFIG
    return 0


def settle() -> None:
    """Spares later garbage collections what has been made so far; for a service that has started.

    One that walks all that the libraries made takes over 100 ms, and nothing of it is garbage.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries that look for leaks at the end would find everything
