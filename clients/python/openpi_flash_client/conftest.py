"""A small PolicyService, and QUIC's edge in front of it."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from openpi_flash.v1 import inference_pb2, policy_pb2_grpc, types_pb2

ACTIONS = np.arange(6.0).reshape(2, 3)


class FakeServer(policy_pb2_grpc.PolicyServiceServicer):
    """Answers ACTIONS plus the seed. `behave` may do something else with a request first."""

    def __init__(self) -> None:
        self.received: list[inference_pb2.InferStreamRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.image_specs = [types_pb2.ImageSpec(path="images/cam_high", height=224)]
        self.num_streams = 0
        self.real_time_chunking = ""
        self.behave: Callable[[inference_pb2.InferStreamRequest, Any], types_pb2.Error | None] = lambda *_: None
        self.port = 0
        self._server: Any = None

    def start(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self._server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self, self._server)
        address = f"127.0.0.1:{self.port}"
        if credentials:
            self.port = self._server.add_secure_port(address, credentials)
        else:
            self.port = self._server.add_insecure_port(address)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def InferStream(self, requests: Any, context: Any) -> Iterator[inference_pb2.InferStreamResponse]:  # noqa: N802
        self.num_streams += 1
        self.metadata.append(dict(context.invocation_metadata()))
        for request in requests:
            self.received.append(request)
            error = self.behave(request, context)
            answer = inference_pb2.InferStreamResponse(request_id=request.request_id, error=error)
            if error is None:
                actions = ACTIONS + request.request.seed
                answer.response.tensors["actions"].MergeFrom(
                    types_pb2.Tensor(dtype=types_pb2.DTYPE_FLOAT64, shape=actions.shape, data=actions.tobytes())
                )
                answer.response.timing.MergeFrom(types_pb2.Timing(model_ms=5, total_ms=7, batch_size=1))
            yield answer

    def GetMetadata(self, *_: Any) -> inference_pb2.GetMetadataResponse:  # noqa: N802
        metadata = inference_pb2.GetMetadataResponse(model_config_name="pi05_droid", action_horizon=2)
        metadata.real_time_chunking = self.real_time_chunking
        metadata.policy_metadata.update({"reset_pose": [0.5, -1.5]})
        metadata.image_specs.extend(self.image_specs)
        return metadata

    def Reset(self, request: inference_pb2.ResetRequest, context: Any) -> inference_pb2.ResetResponse:  # noqa: N802
        if request.session_id == "unknown":
            context.set_trailing_metadata((("openpi-error-field-bin", b"session_id"),))
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "session_id: unknown")
        return inference_pb2.ResetResponse()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    server.start()
    yield server
    server.stop()


class Edge:
    """`openpi-flash-transport server` in front of a FakeServer, on a port that stays the same."""

    def __init__(self, server: FakeServer, directory: Path) -> None:
        self.directory = directory
        self.fingerprint = ""
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._upstream = f"127.0.0.1:{server.port}"
        self._process: subprocess.Popen[str] | None = None

    def start(self, *options: str) -> None:
        binary = shutil.which("openpi-flash-transport", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if binary is None:
            raise AssertionError("no openpi-flash-transport here; `make install` builds it")
        command = [binary, "server", "--action-upstream", self._upstream, "--action-listen", f"127.0.0.1:{self.port}"]
        command += ["--state-dir", str(self.directory), *options]
        self._process = process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603
        log = []
        for line in process.stderr or ():
            log.append(line)
            if found := re.search(r"fingerprint=([0-9a-f]+)", line):
                self.fingerprint = found[1]
            if "listening" in line:
                return
        raise AssertionError("".join(log))

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def edge(server: FakeServer, tmp_path: Path) -> Iterator[Edge]:
    edge = Edge(server, tmp_path / "edge")
    edge.start()
    yield edge
    edge.kill()
