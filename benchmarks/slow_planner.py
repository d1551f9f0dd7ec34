"""The planner service with a model that takes a second longer, and no processor, for every batch."""

import sys
import time
from collections.abc import Sequence

from openpi_flash_models.planner.planner import GeneratedSubtask, Planner, PreparedPlan
from openpi_flash_planner.__main__ import main

DELAY_S = 1.0


def install() -> None:
    """Makes every planner that this process loads slow."""
    run = Planner.run

    def slow(planner: Planner, prepared: Sequence[PreparedPlan]) -> list[GeneratedSubtask]:
        time.sleep(DELAY_S)
        return run(planner, prepared)

    Planner.run = slow


if __name__ == "__main__":
    install()
    sys.exit(main())
