"""The gateway's process."""

import sys

from openpi_flash_common.process import run_service, settle
from openpi_flash_common.settings import EngineSettings

from openpi_flash_gateway.gateway import Gateway


def main(arguments: list[str] | None = None) -> int:
    """Runs the gateway until SIGTERM; returns the exit status."""
    return run_service("gateway", _serve, arguments)


async def _serve(settings: EngineSettings) -> None:
    gateway = Gateway(settings)
    await gateway.start()
    settle()
    await gateway.run_until_stopped()


if __name__ == "__main__":
    sys.exit(main())
