"""Network namespaces on one machine, joined by emulated links: round trip, rate, loss and bursts as a test asks.

    with Network() as network:
        robot, server = network.namespace("robot"), network.namespace("server")
        link = network.link(robot, server, rtt_ms=20, rate_mbit=100)
        server.start(["program", "--host", link.server_address])
        link.set(loss=1)

Needs root, /dev/net/tun, `ip` and a C compiler; `unavailable` says what is missing. TCP in the namespaces is cubic, the
default of robots' kernels, and remembers nothing of earlier connections, so that one measurement does not colour the
next. What a run that was killed left behind is removed by the next one.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

SOURCE = Path(__file__).with_name("linkemu.c")
CACHE = Path(__file__).parents[2] / ".cache/link"
RUNS = Path("/run/openpi-flash-link")
"""A file for each run, locked while it lasts."""
CONGESTION_CONTROL = "cubic"
ALLOWED_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
STOP_TIMEOUT_S = 10.0

To = Literal["server", "robot"]
_SUFFIXES = {"server": "_ab", "robot": "_ba", None: ""}
_OPTIONS = {
    "rtt_ms": ("delay", 0.5),
    "jitter_ms": ("jitter", 1),
    "reorder": ("reorder", 1),
    "rate_mbit": ("rate", 1),
    "buffer_ms": ("buffer", 1),
    "loss": ("loss", 1),
    "burst_loss": ("burst_loss", 1),
    "burst_ms": ("burst_ms", 1),
    "burst_every_ms": ("burst_every", 1),
    "seed": ("seed", 1),
}
"""Name here: name in the emulator, and factor."""


class LinkError(RuntimeError):
    """A link cannot be made or changed."""


def unavailable() -> str | None:
    """Why links cannot be made here; None: they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun (the kernel's tun module)"
    missing = [program for program in ("ip", "sysctl", _compiler()) if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


class Network:
    """Namespaces and links that last as long as the context, with all processes started in them."""

    def __init__(self, *, congestion_control: str = CONGESTION_CONTROL) -> None:
        """
        Args:
            congestion_control: of TCP in the namespaces.
        """
        self._congestion_control = congestion_control
        self._prefix = f"opf-{os.getpid()}-"
        self._links = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """
        Raises:
            LinkError: links cannot be made here.
        """
        if reason := unavailable():
            raise LinkError(reason)
        with ExitStack() as stack:
            _remove_leftovers()
            stack.enter_context(_registered_run())
            self._emulator = build_emulator()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def namespace(self, name: str) -> "Namespace":
        """A new namespace, with a loopback device and TCP as asked.

        Raises:
            LinkError: the kernel does not have that congestion control.
        """
        namespace = Namespace(self._prefix + name, self._stack)
        _ip("netns", "add", namespace.name)
        self._stack.callback(_delete_namespace, namespace.name)
        _ip("-n", namespace.name, "link", "set", "lo", "up")
        with _allowed(self._congestion_control):
            namespace.run(
                "sysctl", "-q", "-w",
                f"net.ipv4.tcp_congestion_control={self._congestion_control}",
                "net.ipv4.tcp_no_metrics_save=1",
                "net.ipv6.conf.all.disable_ipv6=1",
            )  # fmt: skip
        used = namespace.run("cat", "/proc/sys/net/ipv4/tcp_congestion_control").strip()
        if used != self._congestion_control:
            raise LinkError(f"TCP in {namespace.name} is {used} in place of {self._congestion_control}")
        return namespace

    def link(self, robot: "Namespace", server: "Namespace", **conditions: float) -> "Link":
        """Joins two namespaces.

        Args:
            conditions: as for `Link.set`.
        """
        self._links += 1
        return self._stack.enter_context(Link(self._emulator, robot, server, self._links, conditions))


class Namespace:
    """A network namespace, in which processes run."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        self.name = name
        self._stack = stack

    def start(self, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
        """Starts a process, which ends with the network at the latest.

        Args:
            options: as for subprocess.Popen.
        """
        process = subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **options)
        self._stack.callback(_stop, process)
        return process

    def run(self, *command: str | Path) -> str:
        """Runs a process to its end; returns its standard output.

        Raises:
            LinkError: it failed.
        """
        return _run("ip", "netns", "exec", self.name, *command)


class Link:
    """An emulated link between a robot's namespace and a server's.

    Attributes:
        robot_address, server_address: of the two ends.
    """

    def __init__(
        self, emulator: Path, robot: Namespace, server: Namespace, number: int, conditions: Mapping[str, float]
    ) -> None:
        self.robot_address, self.server_address = f"10.99.{number}.1", f"10.99.{number}.2"
        self._ends = {"server": (robot.name, f"emu{number}"), "robot": (server.name, f"emu{number}")}
        self._unread_drops = dict.fromkeys(self._ends, 0)
        self._command: list[str | Path] = [
            emulator,
            f"ns_a={robot.name}", f"ip_a={self.robot_address}", f"dev_a=emu{number}",
            f"ns_b={server.name}", f"ip_b={self.server_address}", f"dev_b=emu{number}",
            *_emulator_options(conditions, None),
        ]  # fmt: skip

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[str] = self._process.stdin
        self._stdout: IO[str] = self._process.stdout
        if self._stdout.readline() != "ready\n":
            self.__exit__(None, None, None)
            raise LinkError("the link emulator did not start; it says why above")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _stop(self._process)

    def set(self, to: To | None = None, /, **conditions: float) -> None:
        """Changes the link from now on.

        Args:
            to: `server` or `robot`: only packets to that end; None: both directions.
            conditions: any of
                rtt_ms: round trip; half of it in each direction.
                jitter_ms: each packet's delay varies by up to so much, either way, in each direction.
                reorder: 1: jitter may put packets out of order.
                rate_mbit: Mbit/s of IP packets; 0: no limit.
                buffer_ms: ms of the rate that may wait before the link (100 at first); what would wait longer is lost.
                loss: percent of packets lost, each by itself.
                burst_loss: percent lost during a burst; burst_ms: how long one lasts; burst_every_ms: mean time from
                    the end of one to the start of the next, 0: there are none.
                seed: of chance.

        Raises:
            LinkError: no such condition, or no such value.
        """
        answer = self._ask(" ".join(_emulator_options(conditions, to)))
        if "error" in answer:
            raise LinkError(answer["error"])

    def statistics(self) -> dict[To, dict[str, float]]:
        """What happened since the last call, by where packets went.

        Returns:
            `received`, `sent`: packets into and out of the link, and their `_bytes`; `lost` by chance; `dropped` by the
            full buffer; `bursts` begun; `late_p50_ms`, `late_p99_ms`, `late_max_ms`: how long after its time a packet
            was delivered; `overrun`: packets that the emulator was too slow to read.
        """
        answer = self._ask("stats")
        by_end: dict[To, dict[str, float]] = {"server": answer["ab"], "robot": answer["ba"]}
        for to, (namespace, device) in self._ends.items():
            (shown,) = json.loads(_ip("-n", namespace, "-s", "-j", "link", "show", device))
            unread = shown["stats64"]["tx"]["dropped"]
            by_end[to]["overrun"] = unread - self._unread_drops[to]  # type: ignore[index]
            self._unread_drops[to] = unread
        return by_end

    def _ask(self, line: str) -> dict[str, Any]:
        try:
            print(line, file=self._stdin, flush=True)
            return json.loads(self._stdout.readline())
        except (OSError, ValueError) as error:
            raise LinkError("the link emulator has ended") from error


def build_emulator() -> Path:
    """Compiles the emulator, once for each state of its source.

    Raises:
        LinkError: it cannot be compiled.
    """
    program = CACHE / f"linkemu-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = program.with_suffix(f".{os.getpid()}")
        _run(_compiler(), "-O2", "-Wall", "-pthread", "-o", made, SOURCE, "-lm")
        made.rename(program)
    return program


def _compiler() -> str:
    return os.environ.get("CC", "cc")


def _emulator_options(conditions: Mapping[str, float], to: To | None) -> list[str]:
    if unknown := conditions.keys() - _OPTIONS.keys():
        raise LinkError(f"no such condition: {', '.join(sorted(unknown))}; there are {', '.join(_OPTIONS)}")
    options = ((*_OPTIONS[name], value) for name, value in conditions.items())
    return [f"{option}{_SUFFIXES[to]}={value * factor:.10g}" for option, factor, value in options]


@contextmanager
def _allowed(congestion_control: str) -> Iterator[None]:
    """Lets namespaces choose this congestion control; the host's own default is not touched."""
    allowed = ALLOWED_CONGESTION_CONTROL.read_text()
    if congestion_control in allowed.split():
        yield
        return
    try:
        ALLOWED_CONGESTION_CONTROL.write_text(f"{allowed.strip()} {congestion_control}")
    except OSError as error:
        raise LinkError(f"this kernel has no TCP {congestion_control}") from error
    try:
        yield
    finally:
        ALLOWED_CONGESTION_CONTROL.write_text(allowed)


@contextmanager
def _registered_run() -> Iterator[None]:
    RUNS.mkdir(exist_ok=True)
    with (RUNS / str(os.getpid())).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        Path(file.name).unlink()


def _remove_leftovers() -> None:
    for path in RUNS.glob("*"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # that run is alive
            for namespace in Path("/run/netns").glob(f"opf-{path.name}-*"):
                _delete_namespace(namespace.name)
            path.unlink(missing_ok=True)


def _delete_namespace(name: str) -> None:
    for pid in _ip("netns", "pids", name).split():
        with suppress(ProcessLookupError):  # it has ended since it was listed
            os.kill(int(pid), signal.SIGKILL)
    _ip("netns", "delete", name)


def _stop(process: subprocess.Popen[str]) -> None:
    with process:  # closes its pipes, and waits
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)  # a stopped one would not hear
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise LinkError(f"{' '.join(map(str, command))}: {result.stderr.strip()}")
    return result.stdout
