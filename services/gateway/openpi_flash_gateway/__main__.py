"""The gateway's process."""

import argparse
import asyncio
import sys
from pathlib import Path

from openpi_flash_common.logs import setup_logging
from openpi_flash_common.settings import EXIT_CONFIG, EngineSettings, SettingsError, load_settings

from openpi_flash_gateway.gateway import Gateway


def main(arguments: list[str] | None = None) -> int:
    """Runs the gateway until SIGTERM; returns the exit status."""
    parser = argparse.ArgumentParser(prog="openpi-flash-gateway", description=__doc__)
    parser.add_argument("--config", type=Path, help="settings file; default: the one that INFERENCE_CONFIG_PATH names")
    try:
        settings = load_settings(parser.parse_args(arguments).config)
        setup_logging(settings.log, "gateway")
        asyncio.run(_run(settings))
    except SettingsError as error:
        print(f"openpi-flash-gateway: {error}", file=sys.stderr)
        return EXIT_CONFIG
    return 0


async def _run(settings: EngineSettings) -> None:
    gateway = Gateway(settings)
    await gateway.start()
    await gateway.run_until_stopped()


if __name__ == "__main__":
    sys.exit(main())
