"""The probe against listeners that are ready, are not, and are not there."""

import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from openpi_flash_common import probe
from openpi_flash_common.settings import CONFIG_PATH_VARIABLE, EngineSettings

CHECKPOINT = {"model_config_name": "pi05_droid", "checkpoint_dir": "nowhere"}


@pytest.fixture
def servicer(tmp_path: Path) -> Iterator[tuple[health.HealthServicer, int, Path]]:
    """A health service, on a TCP port and on a socket."""
    servicer, socket = health.HealthServicer(), tmp_path / "socket"
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    yield servicer, port, socket
    server.stop(None).wait()


@pytest.mark.parametrize("service", ["action", "planner", "gateway"])
def test_readiness_is_what_the_health_service_says(servicer, service):
    health_servicer, port, socket = servicer
    listener = {**CHECKPOINT, "grpc_port": port}
    transport = {"unix_socket_path": str(socket)}
    slots = {"action": {"action": listener}, "planner": {"planner": listener}, "gateway": {"action": CHECKPOINT}}
    settings = EngineSettings.model_validate({**slots[service], "action_transport": transport})
    probe.check(service, settings)
    health_servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(probe.NotReadyError, match="NOT_SERVING"):
        probe.check(service, settings)


def test_the_edge_is_asked_where_its_metrics_are():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        telemetry = {"metrics": True, "edge_metrics_port": server.server_port}
        settings = EngineSettings.model_validate({"action": CHECKPOINT, "telemetry": telemetry})
        status = 200
        probe.check("edge", settings)
        status = 503
        with pytest.raises(probe.NotReadyError, match="503"):
            probe.check("edge", settings)
        server.shutdown()
    with pytest.raises(probe.NotReadyError):
        probe.check("edge", settings)


@pytest.mark.parametrize(
    "case",
    [
        ("planner", {"action": CHECKPOINT}, "planner: not configured"),
        ("edge", {"action": CHECKPOINT}, "telemetry.metrics"),
        ("action", {"action": {**CHECKPOINT, "tls": {"cert_file": "c", "key_file": "k"}}}, "action.tls"),
        ("action", {"action": {**CHECKPOINT, "grpc_port": 1}}, "UNAVAILABLE"),
        ("action", {}, "nothing to serve"),
    ],
)
def test_what_is_not_ready_or_cannot_be_asked_is_said_in_a_line(tmp_path, monkeypatch, capsys, case):
    service, settings, problem = case
    path = tmp_path / "settings.json"
    path.write_text(EngineSettings.model_validate(settings).model_dump_json() if settings else "{}")
    monkeypatch.setenv(CONFIG_PATH_VARIABLE, str(path))
    assert probe.main([service]) == 1
    assert problem in capsys.readouterr().err
