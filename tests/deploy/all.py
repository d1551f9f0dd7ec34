"""Every check of deployments, one after the other: `make test-deploy`.

A part that this machine cannot run says why, in the file that TEST_DEPLOY_REASON names, and fails nothing. None may
hang: each has its time, and all together an hour.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time

MINUTES = {"test-compose": 30, "test-helm": 25, "test-pods": 15, "test-terraform": 10}
MINUTES_OF_ALL = 60
MINUTES_TO_STOP = 3


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started, outcomes = time.monotonic(), {}
    for target, minutes in MINUTES.items():
        left_s = MINUTES_OF_ALL * 60 - (time.monotonic() - started)
        part_started = time.monotonic()
        outcome = run(target, min(minutes * 60, left_s))
        outcomes[target] = outcome, time.monotonic() - part_started
    print("\ntest-deploy:")
    for target, (outcome, seconds) in outcomes.items():
        print(f"  {target:<15} {seconds:5.0f} s  {outcome}")
    print(f"  {'all':<15} {time.monotonic() - started:5.0f} s", flush=True)
    return any(outcome.startswith("FAILED") for outcome, _ in outcomes.values())


def run(target: str, timeout_s: float) -> str:
    """What became of a target of make: `passed`, `FAILED…`, or `not run: …`."""
    print(f"\n=== {target}", flush=True)
    with tempfile.NamedTemporaryFile("r") as reason:
        environment = {**os.environ, "TEST_DEPLOY_REASON": reason.name}
        process = subprocess.Popen(["make", "--no-print-directory", target], env=environment, start_new_session=True)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            stop(process)
            return f"FAILED: not done within {timeout_s / 60:.0f} minutes"
        except KeyboardInterrupt:
            stop(process)
            raise
        if status == 0:
            return "passed"
        return f"not run: {why}" if (why := reason.read().strip()) else "FAILED"


def stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, so that everything is put back, and for good where it is not."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(MINUTES_TO_STOP * 60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
