"""Every check of deployments: `make test-deploy`.

A part that this machine cannot run says why, in the file that TEST_DEPLOY_REASON names, and fails nothing. None may
hang: each has its time, and all together an hour.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MINUTES = {"test-compose": 30, "test-helm": 25, "test-pods": 20, "test-terraform": 20}
BESIDE = "test-terraform"  # mostly waits, needs nothing of the others, and shows its output at the end
MINUTES_OF_ALL = 60
SECONDS_TO_STOP = 180


class Part:
    """A target of make, which runs.

    Attributes:
        outcome: what became of it: `passed`, `FAILED…`, or `not run: …`; None while it runs.
        seconds: that it took.
    """

    def __init__(self, target: str, timeout_s: float, folder: Path, *, quiet: bool = False) -> None:
        """Starts it; `folder` takes what it says, of a `quiet` part everything."""
        self.outcome: str | None = None
        self.seconds = 0.0
        self._timeout_s = timeout_s
        self._reason, self._output = folder / f"{target}.reason", folder / f"{target}.log"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                ["make", "--no-print-directory", target],
                env={**os.environ, "TEST_DEPLOY_REASON": str(self._reason), "ALLOW_SKIPS": "1"},
                stdout=output if quiet else None,
                stderr=output if quiet else None,
                start_new_session=True,
            )
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        started = time.monotonic()
        try:
            status = self._process.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            self._end()
            outcome = f"FAILED: not done within {self._timeout_s / 60:.0f} minutes"
        else:
            why = self._reason.read_text().strip() if self._reason.exists() else ""
            outcome = "passed" if status == 0 else f"not run: {why}" if why else "FAILED"
        self.seconds = time.monotonic() - started
        self.outcome = outcome

    def _end(self) -> None:
        """As Ctrl-C does, so that everything is put back; and for good where that takes too long."""
        with contextlib.suppress(ProcessLookupError):  # it ends by itself just now
            os.killpg(self._process.pid, signal.SIGINT)
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait(self) -> str:
        """The outcome; of a quiet part the output is printed now."""
        self._thread.join()
        assert self.outcome is not None
        print(self._output.read_text(errors="replace"), end="", flush=True)
        return self.outcome

    def stop(self) -> None:
        if self.outcome is None:
            self._end()
        self._thread.join()


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        return run_all(Path(folder))


def run_all(folder: Path) -> int:
    started = time.monotonic()
    parts: dict[str, Part] = {}

    def start(target: str) -> None:
        left_s = MINUTES_OF_ALL * 60 - (time.monotonic() - started)
        timeout_s = max(0, min(MINUTES[target] * 60, left_s))
        parts[target] = Part(target, timeout_s, folder, quiet=target == BESIDE)

    try:
        start(BESIDE)
        for target in MINUTES:
            print(f"\n=== {target}", flush=True)
            if target != BESIDE:
                start(target)
            parts[target].wait()
    finally:
        for part in parts.values():
            part.stop()
    print("\ntest-deploy:")
    for target in MINUTES:
        print(f"  {target:<15} {parts[target].seconds:5.0f} s  {parts[target].outcome}")
    print(f"  {'all':<15} {time.monotonic() - started:5.0f} s, {BESIDE} beside the others", flush=True)
    return any(str(part.outcome).startswith("FAILED") for part in parts.values())


if __name__ == "__main__":
    sys.exit(main())
