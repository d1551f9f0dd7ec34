"""The supervisor against small real processes."""

import asyncio
import io
import os
import signal
import sys
import time
from pathlib import Path

from openpi_flash_common.settings import EXIT_CONFIG

from openpi_flash_cli.supervisor import Program, Supervisor

STEADY = "import time; print('up', flush=True); time.sleep(60)"


def program(name: str, code: str) -> Program:
    return Program(name, (sys.executable, "-c", code))


async def until(condition, what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s for {what}")
        await asyncio.sleep(0.02)


async def test_prefixes_output_and_stops_in_reverse_order(tmp_path: Path):
    ended = tmp_path / "ended"
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n    open({path!r}, 'a').write({name!r} + ' '); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(60)"
    )
    log = io.StringIO()
    names = ("action", "gateway")
    supervisor = Supervisor([program(n, code.format(path=str(ended), name=n)) for n in names], log=log)
    run = asyncio.create_task(supervisor.run())
    await until(lambda: log.getvalue().count("up") == 2, "both programs")
    assert "action  | up\n" in log.getvalue()
    assert "gateway | up\n" in log.getvalue()
    supervisor.stop()
    assert await run == 0
    assert ended.read_text() == "gateway action "


async def test_restarts_what_dies(tmp_path: Path):
    log = io.StringIO()
    code = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"
    supervisor = Supervisor([program("action", code)], log=log)
    run = asyncio.create_task(supervisor.run())
    await until(lambda: "pid" in log.getvalue(), "the first start")
    os.kill(int(log.getvalue().split()[-1]), signal.SIGKILL)
    await until(lambda: log.getvalue().count("pid") == 2, "the second start")
    assert "ended with signal SIGKILL; starting again in 0.5 s" in log.getvalue()
    supervisor.stop()
    assert await run == 0


async def test_a_program_that_cannot_run_ends_everything():
    log = io.StringIO()
    bad = program("action", f"print('checkpoint missing', flush=True); raise SystemExit({EXIT_CONFIG})")
    supervisor = Supervisor([bad, program("gateway", STEADY)], log=log)
    assert await asyncio.wait_for(supervisor.run(), 30) == EXIT_CONFIG
    assert "action  | checkpoint missing" in log.getvalue()
    assert "starting again" not in log.getvalue()


async def test_kills_what_ignores_sigterm():
    log = io.StringIO()
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    supervisor = Supervisor([program("action", deaf)], stop_timeout_s=0.3, log=log)
    run = asyncio.create_task(supervisor.run())
    await until(lambda: "up" in log.getvalue(), "the start")
    supervisor.stop()
    assert await run == 1
    assert "still running 0.3 s after SIGTERM; killed" in log.getvalue()


async def test_children_do_not_outlive_a_killed_supervisor():
    code = (
        "import asyncio, sys; from openpi_flash_cli.supervisor import Program, Supervisor\n"
        "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "async def main(): await Supervisor([Program('child', (sys.executable, '-c', child))]).run()\n"
        "asyncio.run(main())"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stderr=asyncio.subprocess.PIPE)
    assert parent.stderr is not None
    child = int((await asyncio.wait_for(parent.stderr.readline(), 30)).split()[-1])
    parent.kill()
    await parent.wait()
    await until(lambda: not _alive(child), "the child's end")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
