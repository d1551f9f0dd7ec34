"""The engine in a process of its own, and sidecars of robots, for tests that span packages."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from openpi_flash.v1 import inference_pb2, types_pb2
from openpi_flash_cli.demo import free_ports
from openpi_flash_cli.edge import find_binary
from openpi_flash_cli.tiny import TinyPolicy
from openpi_flash_client import FlashTransportPolicy
from openpi_flash_common import openpi_msgpack
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from benchmarks.link.link import unavailable

READY = "Service ready"

needs_links = pytest.mark.skipif(unavailable() is not None, reason=f"no emulated links here: {unavailable()}")
"""For tests on links as benchmarks/link emulates them."""


@dataclasses.dataclass
class Engine:
    """`openpi-flash serve` in a process of its own."""

    process: subprocess.Popen[str]
    settings: dict[str, Any]
    settings_file: Path
    state_dir: str
    log: list[str]

    @property
    def grpc_port(self) -> int:
        return self.settings["gateway"]["grpc_port"]

    @property
    def quic_port(self) -> int:
        return self.settings["action_transport"]["quic_port"]

    @property
    def action_port(self) -> int:
        return self.settings["action"]["grpc_port"]

    @property
    def admin_port(self) -> int:
        return self.settings["gateway"]["admin"]["port"]

    def websocket_port(self, slot: str = "action") -> int:
        return self.settings[f"{slot}_transport"]["websocket_port"]

    def wait_for(self, pattern: str | re.Pattern[str], *, count: int = 1, timeout_s: float = 120) -> None:
        """Waits until so many lines of the log match."""
        deadline = time.monotonic() + timeout_s
        while self.count(pattern) < count:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"fewer than {count} of {pattern!r} in the log:\n" + "\n".join(self.log))
            time.sleep(0.02)

    def count(self, pattern: str | re.Pattern[str]) -> int:
        """How many lines of the log match."""
        return sum(bool(re.search(pattern, line)) for line in self.log)

    def fingerprint(self) -> str:
        """Of the edge's certificate, once its log says so."""
        self.wait_for(r"edge.*fingerprint")
        found = [match[1] for line in self.log if (match := re.search(r"fingerprint=([0-9a-f]+)", line))]
        return found[-1]

    def over_quic(self, **options: Any) -> FlashTransportPolicy:
        """A robot's client; the options are its own."""
        return FlashTransportPolicy("127.0.0.1", self.quic_port, fingerprint=self.fingerprint(), **options)

    @contextlib.contextmanager
    def over_websocket(self) -> Iterator[ClientConnection]:
        """A connection after the server's metadata, for `ask`."""
        with connect(f"ws://127.0.0.1:{self.websocket_port()}", compression=None, max_size=None) as connection:
            assert openpi_msgpack.unpackb(connection.recv(60)) == {}  # DROID's configurations have no metadata
            yield connection

    def child_pid(self, module: str) -> int:
        """The process that runs a service, e.g. `openpi_flash_action`."""
        return next(pid for pid in self._children() if module in Path(f"/proc/{pid}/cmdline").read_text())

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """SIGKILL to it and to all that it runs, as when a machine is switched off."""
        children = self._children()
        self.process.kill()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _children(self) -> list[int]:
        if self.process.poll() is not None:
            return []
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


@contextlib.contextmanager
def running_engine(
    tiny: TinyPolicy, directory: Path, *, ready: str | re.Pattern[str] = READY, **settings: Any
) -> Iterator[Engine]:
    """An engine as `start_engine` starts it, once it is ready; it has to stop cleanly."""
    engine = start_engine(tiny, directory, **settings)
    try:
        engine.wait_for(ready)
        yield engine
        assert engine.stop() == 0
    finally:
        engine.kill()


def start_engine(
    tiny: TinyPolicy,
    directory: Path,
    *,
    slots: Sequence[str] = ("action",),
    planner: dict[str, Any] | None = None,
    telemetry: dict[str, Any] | None = None,
    gateway: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    **action: Any,
) -> Engine:
    """Starts an engine for a tiny policy on free ports; does not wait for it.

    Args:
        slots: of `action` and `planner`, both from the same checkpoint.
        planner: fields of the `planner` section; telemetry, gateway: of theirs.
        environment: variables beside those of this process.
        action: fields of the `action` section.
    """
    ports = iter(free_ports(8))
    own = {
        "action": {"max_batch_size": 2, "warm_up": {"prompt_buckets": [64]}, **action},
        "planner": planner or {},
    }
    # A Unix socket's path may not be longer than 107 bytes; pytest's folders can be.
    sockets = tempfile.mkdtemp(prefix="opf-")
    settings: dict[str, Any] = {
        slot: {
            "model_config_name": str(tiny.policy_file),
            "checkpoint_dir": str(tiny.checkpoint_dir),
            "precision": "float32",
            "grpc_port": next(ports),
            **own[slot],
        }
        for slot in slots
    }
    for slot in ("action", "planner"):
        settings[f"{slot}_transport"] = {
            "websocket_port": next(ports),
            "quic_port": next(ports),  # free for TCP, and so most likely for UDP
            "unix_socket_path": f"{sockets}/{slot}",
        }
    own_gateway = {"host": "127.0.0.1", "grpc_port": next(ports), "admin": {"port": next(ports)}}
    settings["gateway"] = own_gateway | (gateway or {})
    settings["telemetry"] = telemetry or {}
    return _start(settings, directory / "settings.json", f"{sockets}/state", environment or {})


def start_engine_again(engine: Engine, gateway: dict[str, Any]) -> Engine:
    """Starts an engine that has ended once more, with other fields of the `gateway` section."""
    settings = {**engine.settings, "gateway": engine.settings["gateway"] | gateway}
    return _start(settings, engine.settings_file, engine.state_dir, {})


def _start(settings: dict[str, Any], path: Path, state_dir: str, environment: dict[str, str]) -> Engine:
    path.write_text(json.dumps(settings))
    process = subprocess.Popen(
        [sys.executable, "-m", "openpi_flash_cli", "serve", "--config", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "OPENPI_FLASH_STATE_DIR": state_dir, **environment},
    )
    engine = Engine(process, settings, path, state_dir, [])

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            engine.log.append(line.rstrip("\n"))

    threading.Thread(target=read, daemon=True).start()
    return engine


def transport_binary() -> Path:
    """The program of edge and sidecar, which `make install` puts beside Python."""
    path = find_binary()
    assert path is not None
    return path


def ask(connection: ClientConnection, observation: dict[str, Any]) -> Any:
    """What the server answers over WebSocket: a dictionary, or its refusal."""
    connection.send(openpi_msgpack.packb(observation))
    answer = connection.recv(60)
    return answer if isinstance(answer, str) else openpi_msgpack.unpackb(answer)


@contextlib.contextmanager
def sidecar(
    binary: Path, engine: Engine, slot: str = "action", pin: str = "", options: Sequence[str] = ()
) -> Iterator[int]:
    """A sidecar's gRPC port."""
    (port,) = free_ports(1)
    server = f"127.0.0.1:{engine.settings[f'{slot}_transport']['quic_port']}"
    trust = ["--fingerprint", pin or engine.fingerprint()]
    process = subprocess.Popen([binary, "client", server, "--listen", f"127.0.0.1:{port}", *trust, *options])
    try:
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def stub_request(observation: dict[str, Any], seed: int) -> inference_pb2.InferRequest:
    """What a robot with generated stubs sends: pictures as typed images, here as PNG."""
    request = inference_pb2.InferRequest(seed=seed)
    for name, value in observation.items():
        if name == "prompt":
            request.observation.prompt = value
        elif value.ndim == 3:
            png = io.BytesIO()
            Image.fromarray(value).save(png, "PNG")
            image = request.observation.images[name]
            image.encoding, image.height, image.width = types_pb2.IMAGE_ENCODING_PNG, *value.shape[:2]
            image.data = png.getvalue()
        else:
            tensor = request.observation.tensors[name]
            tensor.dtype, tensor.data = types_pb2.DTYPE_FLOAT64, value.astype("<f8").tobytes()
            tensor.shape.extend(value.shape)
    return request
