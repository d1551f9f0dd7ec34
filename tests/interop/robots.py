"""Robots with the stock openpi-client, each in a process of its own."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Robot:
    """A stock robot in a process of its own, connected and waiting."""

    def __init__(self, python: Path, role: str, port: int, observation: Path, calls: int, *, host: str) -> None:
        script = Path(__file__).with_name("stock_robot.py")
        self.process = subprocess.Popen(
            [python, "-I", script, role, host, str(port), observation, str(calls)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_connected(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def tell(self) -> None:
        """The word to begin; the second time, to stop."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def result(self) -> dict[str, Any]:
        output, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0
        return json.loads(output)


@contextmanager
def robots(
    python: Path, roles: list[str], port: int, observation: Path, calls: int, *, host: str = "127.0.0.1"
) -> Iterator[list[Robot]]:
    started = [Robot(python, role, port, observation, calls, host=host) for role in roles]
    try:
        for robot in started:
            robot.wait_connected()
        for robot in started:
            robot.tell()
        yield started
    finally:
        for robot in started:
            robot.process.kill()
            robot.process.wait()
