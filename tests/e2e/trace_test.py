"""One trace from the robot's call, over gRPC or QUIC, through gateway, planner and action service, to the models; and
metrics of all."""

import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from openpi_flash_cli.demo import free_ports
from openpi_flash_cli.tiny import TinyPolicy
from openpi_flash_client import GrpcPolicy

from tests.collector import Collector
from tests.support import READY, sidecar, start_engine, transport_binary

TRACE_ID, QUIC_TRACE_ID, UNSAMPLED_ID = (digit * 32 for digit in "123")
ROBOT_SPAN_ID = "b7ad6b7169203331"


def test_one_trace_leads_from_the_robot_to_the_model(
    tiny_policies: dict[str, TinyPolicy], tmp_path: Path, observation: dict[str, Any]
):
    collector = Collector()
    gateway_metrics, action_metrics, planner_metrics, edge_metrics = free_ports(4)
    telemetry = {
        "otlp_endpoint": collector.endpoint,
        "metrics": True,
        "gateway_metrics_port": gateway_metrics,
        "action_metrics_port": action_metrics,
        "planner_metrics_port": planner_metrics,
        "edge_metrics_port": edge_metrics,
    }
    binary = transport_binary()
    environment = {"OPENPI_FLASH_TRANSPORT_BINARY": str(binary), "OPENPI_FLASH_STATE_DIR": str(tmp_path / "state")}
    engine = start_engine(
        tiny_policies["jax"],
        tmp_path,
        slots=("action", "planner"),
        planner={"max_batch_size": 1, "warm_up": {"prompt_buckets": [64]}, "timeout_ms": 20_000},
        telemetry=telemetry,
        environment=environment,
        max_batch_size=1,
    )
    try:
        engine.wait_for(READY)
        with GrpcPolicy("127.0.0.1", engine.grpc_port) as client:
            client.infer(observation, traceparent=f"00-{TRACE_ID}-{ROBOT_SPAN_ID}-01", timeout_s=60)
            client.infer(observation, traceparent=f"00-{UNSAMPLED_ID}-{ROBOT_SPAN_ID}-00", timeout_s=60)
        with (
            sidecar(binary, engine, options=["--otlp-endpoint", collector.endpoint]) as port,
            GrpcPolicy("127.0.0.1", port) as client,
        ):
            client.infer(observation, traceparent=f"00-{QUIC_TRACE_ID}-{ROBOT_SPAN_ID}-01", timeout_s=60)
            client.infer(observation, traceparent=f"00-{UNSAMPLED_ID}-{ROBOT_SPAN_ID}-00", timeout_s=60)
        for port, sample in (
            (edge_metrics, 'openpi_flash_edge_requests_total{slot="action",method="Infer",code="OK"} 2'),
            (gateway_metrics, 'openpi_flash_requests_total{code="OK",method="PolicyService/InferStream"} 4.0'),
            (gateway_metrics, 'openpi_flash_subtasks_total{status="fresh"} 4.0'),
            (action_metrics, "openpi_flash_model_seconds_count 4.0"),
            (planner_metrics, 'openpi_flash_requests_total{code="OK",method="PlannerService/GenerateSubtask"} 4.0'),
        ):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                assert sample in page.read().decode()
        assert engine.stop() == 0  # sends what is left
        deadline = time.monotonic() + 20
        while [span.name for span in collector.spans].count("model") < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        engine.process.kill()
        collector.stop()
    over_grpc, over_quic = paths(collector, TRACE_ID), paths(collector, QUIC_TRACE_ID)
    assert ("PolicyService/InferStream", "ActionService/InferStream", "model") in over_grpc
    assert ("PolicyService/InferStream", "PlannerService/GenerateSubtask", "model") in over_grpc
    outside = ("sidecar Infer", "edge Infer")
    assert over_quic == {outside[:1], outside} | {(*outside, *path) for path in over_grpc}
    assert not paths(collector, UNSAMPLED_ID)
    attributes = {item.key: item.value for item in collector.named("edge Infer").attributes}
    assert attributes["slot"].string_value == "action"
    assert attributes["method"].string_value == "Infer"
    assert attributes["status"].string_value == "OK"
    pictures = [value for value in observation.values() if isinstance(value, np.ndarray) and value.dtype == np.uint8]
    assert attributes["request_bytes"].int_value > sum(picture.nbytes for picture in pictures) > 0
    assert attributes["receive_ms"].double_value > 0
    services = {f"openpi-flash-{name}" for name in ("sidecar", "edge", "gateway", "action", "planner")}
    assert collector.services == services


def paths(collector: Collector, trace_id: str) -> set[tuple[str, ...]]:
    """Of each span of a trace, the names from the robot's call to it."""
    ours = {span.span_id.hex(): span for span in collector.spans if span.trace_id.hex() == trace_id}
    found = set()
    for span in ours.values():
        path = [span.name]
        while span.parent_span_id.hex() != ROBOT_SPAN_ID:
            span = ours[span.parent_span_id.hex()]  # noqa: PLW2901
            path.append(span.name)
        found.add(tuple(reversed(path)))
    return found
