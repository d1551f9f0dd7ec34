"""A robot that does as it is told. Runs in the robot's namespace, and in the environment of the client that it drives.

    robot.py CLIENT HOST PORT PHOTOGRAPHS.npz

Each line of input is a JSON object; each is answered by one. `{"connect": N}`: N times a new connection and a first
call. `{"calls": N, "period_s": P, "limit_s": L, "offset_s": O}`: up to N calls, one every P seconds (0: back to back),
for up to L seconds, the first after O seconds. Both take `"pictures": NAME`, which photographs to send.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from photographs import views

CALL_TIMEOUT_S = 60.0
START_TIMEOUT_S = 60.0


class Policy(Protocol):
    def infer(self, obs: dict[str, Any]) -> dict[str, Any]: ...


def openpi_client(host: str, port: int) -> tuple[Policy, Callable[[], None]]:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    policy = WebsocketClientPolicy(host, port)
    return policy, policy._ws.close  # it has no way to close


def grpc(host: str, port: int) -> tuple[Policy, Callable[[], None]]:
    from openpi_flash_client import GrpcPolicy

    policy = GrpcPolicy(host, port, insecure_plaintext=True, timeout_s=CALL_TIMEOUT_S)
    return policy, policy.close


def sidecar(host: str, port: int) -> tuple[Policy, Callable[[], None]]:
    """A sidecar of its own for each connection, so that a first call includes the sidecar's start."""
    from openpi_flash_client import GrpcPolicy

    directory = tempfile.TemporaryDirectory(prefix="opf-")
    socket = f"{directory.name}/policy.sock"
    command = [os.environ["OPENPI_FLASH_TRANSPORT_BINARY"], "--log-level", "error", "client", f"{host}:{port}"]
    process = subprocess.Popen([*command, "--listen", f"unix:{socket}", "--insecure-skip-verify"])

    def end() -> None:
        process.terminate()
        process.wait()
        directory.cleanup()

    def close() -> None:
        policy.close()
        end()

    try:
        policy = GrpcPolicy(unix_socket=socket, timeout_s=CALL_TIMEOUT_S)
    except BaseException:
        end()
        raise
    return policy, close


def quic(host: str, port: int) -> tuple[Policy, Callable[[], None]]:
    from openpi_flash_client import FlashTransportPolicy

    policy = FlashTransportPolicy(host, port=port, insecure_skip_verify=True, timeout_s=CALL_TIMEOUT_S)
    return policy, policy.close


CLIENTS = {"openpi-client": openpi_client, "grpc": grpc, "sidecar": sidecar, "quic": quic}


class Robot:
    def __init__(self, client: str, host: str, port: int, photographs: dict[str, np.ndarray]) -> None:
        self._open = lambda: CLIENTS[client](host, port)
        self._photographs = photographs
        self._step = 0
        self._policy, self._close = self._wait_for_server()

    def connect(self, count: int, pictures: str) -> dict[str, Any]:
        connect_ms: list[float] = []
        first_ms: list[float] = []
        errors: list[str] = []
        for _ in range(count):
            self._close()
            started = time.perf_counter()
            try:
                self._policy, self._close = self._open()
                connected = time.perf_counter()
                first_ms.append(self._call(pictures))
                connect_ms.append((connected - started) * 1e3)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
        return {"connect_ms": connect_ms, "ms": first_ms, "errors": errors}

    def call(self, count: int, pictures: str, period_s: float, limit_s: float, offset_s: float) -> dict[str, Any]:
        ms: list[float] = []
        errors: list[str] = []
        started = time.perf_counter()
        due = started + offset_s
        while len(ms) + len(errors) < count and due - started - offset_s < limit_s:
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                ms.append(self._call(pictures))
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
            due = max(due + period_s, time.perf_counter())
        return {"ms": ms, "errors": errors, "seconds": time.perf_counter() - started}

    def _wait_for_server(self) -> tuple[Policy, Callable[[], None]]:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return self._open()
            except Exception:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def _call(self, pictures: str) -> float:
        self._step += 1
        cameras = zip(("top", "left", "right"), views(self._photographs[pictures], self._step), strict=True)
        observation = {**dict(cameras), "state": np.linspace(-0.5, 0.5, 8), "prompt": "fold the towel"}
        started = time.perf_counter()
        self._policy.infer(observation)
        return (time.perf_counter() - started) * 1e3


def main() -> None:
    client, host, port, photographs = sys.argv[1:]
    robot = Robot(client, host, int(port), dict(np.load(photographs)))
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "connect" in order:
            answer = robot.connect(order["connect"], order["pictures"])
        else:
            answer = robot.call(
                order["calls"], order["pictures"], order["period_s"], order["limit_s"], order["offset_s"]
            )
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
