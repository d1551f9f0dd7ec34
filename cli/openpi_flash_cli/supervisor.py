"""Keeps child processes running: starts them, prefixes what they say, restarts what dies, stops all in order."""

import asyncio
import dataclasses
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from openpi_flash_common.settings import EXIT_CONFIG

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
STEADY_S = 60.0
"""A child that ran this long is started again after the first backoff."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to keep running.

    Attributes:
        name: prefix of its log lines.
        argv: command and arguments.
    """

    name: str
    argv: tuple[str, ...]


class Supervisor:
    """Runs programs until told to stop, or until one of them cannot run at all."""

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        handles_signals: bool = True,
        stop_timeout_s: float = 40.0,
        log: TextIO = sys.stderr,
    ) -> None:
        """
        Args:
            programs: started in this order, stopped one by one in the opposite order.
            handles_signals: False inside a program that has its own way of stopping, and then calls `stop`.
            stop_timeout_s: how long one program may take from SIGTERM to its end; then it is killed.
            log: where the programs' output and the supervisor's own lines go.
        """
        self._programs = tuple(programs)
        self._signals = (signal.SIGTERM, signal.SIGINT) if handles_signals else ()
        self._stop_timeout_s = stop_timeout_s
        self._log = log
        self._stopping = asyncio.Event()
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._exit_code = 0

    def stop(self) -> None:
        """Begins an orderly stop; `run` returns when it is done."""
        self._stopping.set()

    async def run(self) -> int:
        """Runs until `stop`, a handled SIGTERM or SIGINT, or a program that says, by EXIT_CONFIG, that it cannot run.

        Returns:
            0 after an orderly stop, EXIT_CONFIG if a program could not run, 1 if one had to be killed.
        """
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.add_signal_handler(number, self.stop)
        try:
            keepers = [asyncio.create_task(self._keep(program)) for program in self._programs]
            await self._stopping.wait()
            for program in reversed(self._programs):
                await self._end(program)
            await asyncio.gather(*keepers)
        finally:
            for number in self._signals:
                loop.remove_signal_handler(number)
        return self._exit_code

    async def _keep(self, program: Program) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._stopping.is_set():
            started = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                *_die_with_parent(),
                *program.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=1 << 20,
                start_new_session=True,  # a Ctrl-C reaches this process alone, which then stops the others in order
            )
            self._processes[program.name] = process
            await self._copy_output(program.name, process)
            code = await process.wait()
            if self._stopping.is_set():
                return
            if code == EXIT_CONFIG:
                self._exit_code = EXIT_CONFIG
                self.stop()
                return
            if time.monotonic() - started >= STEADY_S:
                backoff_s = FIRST_BACKOFF_S
            self._say(program.name, f"ended with {_describe(code)}; starting again in {backoff_s:g} s")
            await self._sleep_unless_stopping(backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)

    async def _end(self, program: Program) -> None:
        process = self._processes.get(program.name)
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self._stop_timeout_s)
        except TimeoutError:
            self._say(program.name, f"still running {self._stop_timeout_s:g} s after SIGTERM; killed")
            process.kill()
            await process.wait()
            self._exit_code = self._exit_code or 1

    async def _copy_output(self, name: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101 - asked for above
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than the reader's limit, which has been dropped
                self._say(name, "wrote a line of more than 1 MiB, left out here")
                continue
            if not line:
                return
            self._say(name, line.decode(errors="replace").rstrip("\n"))

    async def _sleep_unless_stopping(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    def _say(self, name: str, text: str) -> None:
        print(f"{name:<7} | {text}", file=self._log, flush=True)


def _die_with_parent() -> tuple[str, ...]:
    """Puts a command under a kernel's watch that ends it when the supervisor dies without a chance to do so itself.

    util-linux's setpriv sets it between fork and exec; where there is none, such a death leaves the programs running.
    """
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "TERM", "--") if setpriv else ()


def _describe(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
