"""What checks of deployments share."""

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openpi_flash_client import PolicyError

ROOT = Path(__file__).parents[2]


def run(*command: str, check: bool = True, **options: Any) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout + done.stderr


def compose_build(*arguments: str) -> None:
    """Builds images of docker-compose.yaml: `docker compose ARGUMENTS`, which hold `build`.

    Gigabytes come over the network, and pip takes a download that broke off for a wrong file: it is tried three times.
    """
    for attempt in range(3):
        try:
            run("docker", "compose", *arguments)
            return
        except AssertionError as failure:
            if attempt == 2:
                raise
            say(f"building once more: {str(failure)[-300:]}")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.2)


def say(text: str) -> None:
    print(f"\n    {text}", end="", flush=True)


class Robot:
    """Calls in a loop until it is told to stop, and remembers when it was answered and what it was told instead."""

    def __init__(self, infer: Callable[[], Any]) -> None:
        self.answers: list[float] = []
        self.errors: list[str] = []
        self._infer = infer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._infer()
                self.answers.append(time.monotonic())
            except PolicyError as error:
                self.errors.append(f"{type(error).__name__}: {error}")
            self._stop.wait(0.05)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def silence_s(self) -> float:
        """The longest time between two answers."""
        return max(later - earlier for earlier, later in zip(self.answers, self.answers[1:], strict=False))
