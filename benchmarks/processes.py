"""Processes of a benchmark: they end with it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def running(command: list[str | Path], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process of a command, with the options of `subprocess.Popen`."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
