"""How long a robot waits for an answer over a real link: every way to reach the policy, on the same emulated links.

    python -m benchmarks.link.bench table [--quick]   answer times by round trip, rate and loss
    python -m benchmarks.link.bench fairness          a TCP flow on the same link
    python -m benchmarks.link.bench robots            sixteen robots, one on a bad link and one that stalls

Needs root (network namespaces). A limit is what physics allows: the round trip, and the time that the pictures' bytes,
as they are or as JPEG, take at the link's rate; lossless coding may go below it. On each link the contenders take turns
in short blocks, so that a noisy moment of the machine hits all of them.
"""

import argparse
import importlib.metadata
import json
import mmap
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.link import crowd, fairness, table
from benchmarks.link.contenders import CONTENDERS, SIDECAR, STOCK_PYTHON, transport_binary
from benchmarks.link.link import CONGESTION_CONTROL, LinkError, Network
from benchmarks.link.table import IDLE_PERIOD_S

COMMANDS = {"table": table, "fairness": fairness, "robots": crowd}
PACKAGES = ("openpi-client", "openpi-flash-client", "websockets", "grpcio", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, description=module.__doc__)
        names = "those whose names hold one of these; else all, but no sidecar in the quick table"
        command.add_argument("--contenders", nargs="+", help=names)
        command.add_argument("--json", type=Path, help="write all figures here")
        command.add_argument("--markdown", type=Path, help="write the tables here, too")
        module.add_arguments(command)
    arguments = parser.parse_args()
    chosen = [c for c in CONTENDERS if any(part.lower() in c.name.lower() for part in arguments.contenders or [""])]
    if arguments.contenders is None and "quick" in arguments and arguments.quick:
        chosen.remove(SIDECAR)  # it is the raw pictures' QUIC and a local hop: no time for it
    contenders = [c for c in chosen if not c.missing]
    if not contenders:
        parser.error("none of them can take part: " + "; ".join(f"{c.name}: {c.missing}" for c in chosen))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so tidies up
    try:
        with tempfile.TemporaryDirectory(prefix="opf-") as temporary, Network() as network:
            figures, lines = COMMANDS[arguments.command].run(network, Path(temporary), contenders, arguments)
    except LinkError as error:
        print(f"nothing can be measured: {error}", file=sys.stderr)
        return 1
    lines += ["", *(f"- {c.name}: {c.missing}" for c in chosen if c.missing)]
    machine = describe_machine()
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, **figures}, indent=1) + "\n")
    return 0


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    processor = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    (stock_site,) = STOCK_PYTHON.parents[1].glob("lib/python*/site-packages") if STOCK_PYTHON.exists() else [None]
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "revision": revision.stdout.strip() or "unknown",
        "processor": f"{processor[1] if processor else platform.machine()}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "congestion control": f"{CONGESTION_CONTROL}, without the memory of earlier connections",
        "1 MiB of new memory": "{:.1f} ms back to back, {:.1f} ms each after half a second of rest".format(*touch_ms()),
        "Python": platform.python_version(),
        "ours": versions(sys.path),
        "stock client": versions([str(stock_site)]) if stock_site else "not installed",
    }
    if binary := transport_binary():
        version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
        machine["edge"] = version.stdout.strip() or "unknown"
    return machine


def touch_ms() -> tuple[float, float]:
    """What the first touch of 1 MiB takes: back to back, and rested. Where the latter is many times the former, as on
    some virtual machines, calls after a pause tell of the machine, and the more the more processes they go through.
    """

    def touch() -> float:
        started = time.perf_counter()
        with mmap.mmap(-1, 1 << 20) as memory:
            for offset in range(0, len(memory), mmap.PAGESIZE):
                memory[offset] = 1
        return (time.perf_counter() - started) * 1e3

    def touch_rested() -> float:
        time.sleep(IDLE_PERIOD_S)
        return touch()

    return statistics.median(touch() for _ in range(20)), statistics.median(touch_rested() for _ in range(7))


def versions(folders: list[str]) -> str:
    """Of PACKAGES, as far as they are in those folders."""
    by_name = {of.name: of.version for of in importlib.metadata.distributions(path=folders)}
    return ", ".join(f"{name} {by_name[name]}" for name in PACKAGES if name in by_name)


if __name__ == "__main__":
    sys.exit(main())
