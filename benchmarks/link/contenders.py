"""Who is compared: servers in the server's namespace, robots in the others, each pair speaking in its own way.

All servers have the same policy, which answers at once, so that what is left is the link, and how it is used.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from openpi_flash_cli.edge import BINARY, BINARY_VARIABLE, edge_program, find_binary
from openpi_flash_cli.tiny import TinyPolicy, make_tiny_policy
from openpi_flash_common.settings import ImageSettings, load_settings

from benchmarks.link import photographs
from benchmarks.link.link import Link, Namespace

HERE = Path(__file__).parent
STOCK_PYTHON = HERE.parents[1] / ".cache/openpi-client-env/bin/python"
"""Interpreter of an environment with openpi-client and nothing of openpi-flash; `make bench-link` makes it."""
EXTENSION = "openpi_flash_transport"
"""Module of Rust in FlashTransportPolicy."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

PICTURES = {"3x224x224": (224, 224), "3x480x640": (480, 640)}
"""Name of what a robot's cameras give: height and width of each of its three pictures."""
MODEL_PICTURES = "3x224x224"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way for a robot to reach the policy.

    Attributes:
        name: in tables and on the command line.
        client: what robot.py drives.
        port: of the server.
        encoding: how the server has pictures sent over QUIC. Lossless: raw, or PNG where the link is slow.
        jpeg: quality and subsampling, where they are sent as JPEG.
        python: interpreter of the robot.
    """

    name: str
    client: Literal["openpi-client", "grpc", "quic", "sidecar"]
    port: int
    encoding: Literal["lossless", "raw", "jpeg"] = "lossless"
    jpeg: tuple[int, str] = (ImageSettings().quality, ImageSettings().subsampling)
    python: str | Path = sys.executable

    @property
    def missing(self) -> str | None:
        """Why it cannot take part here; None: it can."""
        if self.client == "quic" and importlib.util.find_spec(EXTENSION) is None:
            return f"not installed: {EXTENSION}"
        if self.client in ("quic", "sidecar") and transport_binary() is None:
            return f"not built: no {BINARY} on the path or beside this Python, and {BINARY_VARIABLE} is not set"
        if not Path(self.python).exists():
            return f"not installed: {self.python}"
        return None


STOCK = Contender("stock WebSocket", "openpi-client", 8100, python=STOCK_PYTHON)
WEBSOCKET = Contender("our WebSocket", "openpi-client", 8000, python=STOCK_PYTHON)
GRPC = Contender("our gRPC", "grpc", 50051)
SIDECAR = Contender("our QUIC, by sidecar", "sidecar", 5555)
QUIC = Contender("our QUIC, lossless", "quic", 5555)
QUIC_RAW = Contender("our QUIC, raw", "quic", 5755, encoding="raw")
QUIC_JPEG_95 = Contender("our QUIC, JPEG 95 4:4:4", "quic", 5655, encoding="jpeg", jpeg=(95, "4:4:4"))
QUIC_JPEG = Contender("our QUIC, JPEG {} {}".format(*Contender.jpeg), "quic", 5855, encoding="jpeg")
"""As a server that asks for JPEG wants it unless told otherwise."""
CONTENDERS = (STOCK, WEBSOCKET, GRPC, SIDECAR, QUIC_RAW, QUIC, QUIC_JPEG_95, QUIC_JPEG)
ACTION_PORT = 50052


@functools.cache
def transport_binary() -> Path | None:
    """The program of QUIC's edge and sidecar; None: there is none here."""
    return find_binary()


def start_servers(namespace: Namespace, directory: Path, contenders: Iterable[Contender]) -> None:
    """Starts what these contenders talk to. The ports are the same each time: the namespace has no others."""
    contenders = set(contenders)
    tiny = make_tiny_policy(directory, robot="three_cameras", layout="torch")
    if STOCK in contenders:
        script = HERE.parent / "stock/server.py"
        arguments: list[str | Path] = [
            tiny.policy_file,
            tiny.checkpoint_dir,
            str(STOCK.port),
            "1",
            "instant",
            "0.0.0.0",
        ]
        _start(namespace, [sys.executable, script, *arguments])
    if contenders - {STOCK}:
        settings = _write_settings(directory, tiny, QUIC, websocket_port=WEBSOCKET.port, grpc_port=GRPC.port)
        _start(namespace, [sys.executable, HERE.parent / "instant.py", "--config", settings])
        _start_gateway(namespace, settings, edge=bool(contenders & {QUIC, SIDECAR}))
    for contender in {contender for contender in contenders if contender.client == "quic"} - {QUIC}:
        others = {"websocket_port": contender.port + 1, "grpc_port": contender.port + 2}  # which nobody asks
        settings = _write_settings(directory, tiny, contender, **others)
        _start_gateway(namespace, settings, edge=True)


def _write_settings(
    directory: Path, tiny: TinyPolicy, contender: Contender, *, websocket_port: int, grpc_port: int
) -> Path:
    """What the gateway and the edge of a contender read, in a file named after its port."""
    quality, subsampling = contender.jpeg
    images = {"encoding": contender.encoding, "quality": quality, "subsampling": subsampling}
    settings = {
        "action": {
            "model_config_name": str(tiny.policy_file),
            "checkpoint_dir": str(tiny.checkpoint_dir),
            "precision": "float32",
            "device": "cpu",
            "num_steps": 1,
            "max_batch_size": 1,
            "grpc_port": ACTION_PORT,
        },
        "action_transport": {
            "websocket_port": websocket_port,
            "quic_port": contender.port,
            "unix_socket_path": str(directory / f"{contender.port}.sock"),
        },
        "gateway": {"host": "0.0.0.0", "grpc_port": grpc_port, "admin": None, "images": images},
        "log": {"level": "error"},
    }
    path = directory / f"{contender.port}.json"
    path.write_text(json.dumps(settings))
    return path


def _start_gateway(namespace: Namespace, settings: Path, *, edge: bool) -> None:
    _start(namespace, [sys.executable, "-m", "openpi_flash_gateway", "--config", settings])
    if not edge:
        return
    binary = transport_binary()
    assert binary is not None  # or the contender would not take part
    state = settings.with_suffix(".edge")
    state.mkdir()
    program = edge_program(load_settings(settings, {}), binary, state)
    _start(namespace, [*program.argv, "--state-dir", state])


def _start(namespace: Namespace, command: Sequence[str | Path]) -> None:
    namespace.start(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)


class Photographs:
    """The pictures in a file from which robots read them, and their sizes.

    Attributes:
        path: of the file.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "photographs.npz"
        loaded = {name: photographs.load(*size) for name, size in PICTURES.items()}
        np.savez(self.path, **loaded)  # type: ignore[arg-type]
        self._raw_bytes = {name: 3 * height * width * 3 for name, (height, width) in PICTURES.items()}
        self._views = photographs.views(loaded[MODEL_PICTURES], 0)

    def sent_bytes(self, pictures: str, contender: Contender) -> int:
        """Bytes of pictures in one call, as they are or as JPEG; over QUIC first scaled to what the model sees."""
        if contender.encoding == "jpeg":
            return photographs.jpeg_bytes(self._views, *contender.jpeg)
        return self._raw_bytes[MODEL_PICTURES if contender.client == "quic" else pictures]


class Robot:
    """A robot in a namespace, that makes calls when told to."""

    def __init__(self, contender: Contender, namespace: Namespace, link: Link, pictures: Photographs) -> None:
        command = [contender.python, HERE / "robot.py", contender.client, link.server_address, str(contender.port)]
        environment = {**ENVIRONMENT, BINARY_VARIABLE: str(transport_binary() or "")}
        self._process = namespace.start(
            [*command, pictures.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.name = contender.name
        self.pid = self._process.pid

    def wait_ready(self) -> None:
        """Waits for its connection."""
        assert self._read() == "ready"

    def connect(self, count: int, pictures: str) -> dict[str, Any]:
        """New connections, each with a first call.

        Returns:
            `connect_ms` and `ms`, the first call, of each; `errors`.
        """
        self._tell({"connect": count, "pictures": pictures})
        return self.result()

    def calls(self, count: int, pictures: str, **pace: float) -> dict[str, Any]:
        """Makes calls, and waits for them: `begin` and `result`."""
        self.begin(count, pictures, **pace)
        return self.result()

    def begin(
        self, count: int, pictures: str, *, period_s: float = 0.0, limit_s: float = 1e9, offset_s: float = 0.0
    ) -> None:
        """Begins to make calls, one every `period_s`, for up to `limit_s`, the first after `offset_s`."""
        order = {"calls": count, "pictures": pictures, "period_s": period_s, "limit_s": limit_s, "offset_s": offset_s}
        self._tell(order)

    def result(self) -> dict[str, Any]:
        """Waits for what was begun.

        Returns:
            `ms` of each call, `errors`, and `seconds` that all took.
        """
        return json.loads(self._read())

    def stop(self) -> None:
        """Ends it, and its connection."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the robot of {self.name} has ended; it says why above")
        return line.strip()
