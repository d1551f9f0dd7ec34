"""The examples run as their first lines say."""

import subprocess
import sys
from pathlib import Path

from tests.support import Engine

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_control_loop(engine: Engine):
    lines = run("control_loop.py", "127.0.0.1", str(engine.grpc_port)).splitlines()
    assert len(lines) == 20
    assert all(" 15 actions, the first is [" in line for line in lines)


def test_generated_stubs(engine: Engine):
    output = run("generated_stubs.py", f"127.0.0.1:{engine.grpc_port}")
    assert output.count("[") == 16  # 15 rows in a matrix
    assert "in the action service" in output


def test_async_robots(engine: Engine):
    lines = run("async_robots.py", "127.0.0.1", str(engine.quic_port), engine.fingerprint()).splitlines()
    assert len(lines) == 16
    assert all(": 15 actions in " in line for line in lines[:-1])
    assert lines[-1] == "cancelled: True"
