"""Exit statuses of services, and a service in a process of its own for the tests of each."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openpi_flash_common.process import run_service, settle
from openpi_flash_common.settings import EXIT_CONFIG, SettingsError


class Process:
    """`python -m MODULE` with settings of its own, on a free port that its log names."""

    def __init__(self, module: str, directory: Path, settings: dict[str, Any]) -> None:
        path = directory / "settings.json"
        path.write_text(json.dumps(settings))
        self.log: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--config", str(path)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stderr is not None
        self._stderr = self._process.stderr

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    async def line_with(self, part: str) -> str:
        """Reads the log up to a line that holds `part`."""
        while line := await asyncio.to_thread(self._stderr.readline):
            self.log.append(line.rstrip())
            if part in line:
                return line
        raise AssertionError(f"no {part!r} in the log:\n" + "\n".join(self.log))

    async def address(self) -> str:
        return (await self.line_with("address=")).split("address=")[1].strip()

    async def end(self) -> int:
        """Reads the rest of the log; the exit code."""
        self.log += (await asyncio.to_thread(self._stderr.read)).splitlines()
        return await asyncio.to_thread(self._process.wait, 60)

    async def refusal(self) -> str:
        """What it says, in plain words, when it ends because its settings or files cannot be used."""
        said = await self.line_with("openpi-flash-")
        assert await self.end() == EXIT_CONFIG
        log = "\n".join(self.log)
        assert "Traceback" not in log
        return log[log.index(said.rstrip()) :]

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)


class UnusableError(Exception):
    """Would fail again."""


class TransientError(UnusableError):
    """May work the next time."""


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, 0), (TransientError("gone"), 1), (UnusableError("gone"), 2), (SettingsError("gone"), 2)],
)
def test_the_exit_status_says_whether_to_try_again(tmp_path, capsys, error, status):
    async def serve(settings) -> None:
        assert settings.action.checkpoint_dir == "c"
        if error:
            raise error

    path = tmp_path / "settings.json"
    path.write_text('{"action": {"model_config_name": "m", "checkpoint_dir": "c"}}')
    arguments = ["--config", str(path)]
    assert run_service("action", serve, arguments, unusable=(UnusableError,), transient=(TransientError,)) == status
    assert capsys.readouterr().err == ("openpi-flash-action: gone\n" if error else "")


def test_an_unexpected_error_is_no_status(tmp_path):
    async def serve(_) -> None:
        raise ZeroDivisionError

    path = tmp_path / "settings.json"
    path.write_text('{"planner": {"checkpoint_dir": "c"}}')
    with pytest.raises(ZeroDivisionError):
        run_service("planner", serve, ["--config", str(path)], unusable=(UnusableError,))


@pytest.mark.parametrize("wanted", [None, "event_engine_fork"])
def test_grpc_is_told_how_to_wait_before_it_is_imported_unless_the_operator_has(wanted):
    program = """
import os, sys
class Spy:
    def find_spec(self, name, *_):
        if name == "grpc":
            print(os.environ.get("GRPC_EXPERIMENTS"))
sys.meta_path.insert(0, Spy())
import openpi_flash_common.process
"""
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    if wanted:
        environment["GRPC_EXPERIMENTS"] = wanted
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert said == f"{wanted or '-event_engine_client,-event_engine_listener,-event_engine_for_all_other_endpoints'}\n"


def test_what_is_alive_when_a_service_settles_is_no_later_collections_work():
    try:
        settle()
        alive = gc.get_freeze_count()
        assert alive > 1000
        assert len(gc.get_objects()) < alive
    finally:
        gc.unfreeze()


def test_a_process_that_ends_frees_what_it_has_settled():
    program = """
import atexit, gc
from openpi_flash_common.process import settle
atexit.register(lambda: print(gc.get_freeze_count()))  # called after what is registered later
settle()
print(gc.get_freeze_count() > 1000)
"""
    said = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert said.split() == ["True", "0"]
