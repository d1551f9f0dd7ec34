"""The action service's process."""

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from openpi_flash_common.logs import setup_logging
from openpi_flash_common.settings import EXIT_CONFIG, SettingsError, load_settings
from openpi_flash_models.errors import DownloadError, ModelsError

from openpi_flash_action.scheduler import AcceleratorLostError
from openpi_flash_action.server import serve


def main(arguments: list[str] | None = None) -> int:
    """Runs the action service until SIGTERM; returns the exit status."""
    parser = argparse.ArgumentParser(prog="openpi-flash-action", description=__doc__)
    parser.add_argument("--config", type=Path, help="settings file; default: the one that INFERENCE_CONFIG_PATH names")
    try:
        settings = load_settings(parser.parse_args(arguments).config)
        setup_logging(settings.log, "action")
        logging.getLogger("jax").setLevel(logging.WARNING)  # it tells of every accelerator that is not there
        asyncio.run(serve(settings))
    except (ModelsError, SettingsError, AcceleratorLostError) as error:
        print(f"openpi-flash-action: {error}", file=sys.stderr)
        # Downloads and accelerators may work the next time.
        return 1 if isinstance(error, DownloadError | AcceleratorLostError) else EXIT_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
