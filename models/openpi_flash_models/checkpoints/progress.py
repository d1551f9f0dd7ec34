"""Shows how many bytes of a long job are done: a bar on a terminal, otherwise a log line now and then."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0

Report = Callable[[int], None]
"""Called, from any thread, with each number of bytes that was done; negative when some have to be done again."""


@contextlib.contextmanager
def show_progress(job: str, total: int, *, shown: bool) -> Iterator[Report]:
    """Yields what is to be called as the job goes on. `job` is, for example, `downloading hf://org/repo`."""
    terminal = sys.stderr.isatty()
    bar = tqdm(total=total, desc=job, unit="B", unit_scale=True, disable=not (shown and terminal))
    lock, done, next_log = threading.Lock(), 0, time.monotonic() + LOG_INTERVAL_S

    def report(num_bytes: int) -> None:
        nonlocal done, next_log
        with lock:
            done += num_bytes
            bar.update(num_bytes)
            if shown and not terminal and time.monotonic() > next_log:
                logger.info("%s: %s of %s", job, gigabytes(done), gigabytes(total))
                next_log = time.monotonic() + LOG_INTERVAL_S

    logger.info("%s: %s", job, gigabytes(total))
    with bar:
        yield report


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
