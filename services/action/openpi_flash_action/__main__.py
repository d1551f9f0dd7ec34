"""The action service's process."""

import sys

from openpi_flash_common.process import run_service
from openpi_flash_common.scheduler import AcceleratorLostError
from openpi_flash_models.errors import DownloadError, ModelsError

from openpi_flash_action.server import serve


def main(arguments: list[str] | None = None) -> int:
    """Runs the action service until SIGTERM; returns the exit status."""
    return run_service(
        "action", serve, arguments, unusable=(ModelsError,), transient=(DownloadError, AcceleratorLostError)
    )


if __name__ == "__main__":
    sys.exit(main())
