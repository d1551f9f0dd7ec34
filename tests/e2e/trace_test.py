"""One trace from the robot's call, through gateway, planner and action service, to the models; and metrics of all."""

import time
import urllib.request
from pathlib import Path
from typing import Any

from openpi_flash_cli.demo import free_ports
from openpi_flash_cli.tiny import TinyPolicy
from openpi_flash_client import GrpcPolicy

from tests.collector import Collector
from tests.support import READY, start_engine

TRACE_ID, ROBOT_SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_one_trace_leads_from_the_robot_to_the_model(
    tiny_policies: dict[str, TinyPolicy], tmp_path: Path, observation: dict[str, Any]
):
    collector = Collector()
    gateway_metrics, action_metrics, planner_metrics = free_ports(3)
    telemetry = {
        "otlp_endpoint": collector.endpoint,
        "metrics": True,
        "gateway_metrics_port": gateway_metrics,
        "action_metrics_port": action_metrics,
        "planner_metrics_port": planner_metrics,
    }
    engine = start_engine(
        tiny_policies["jax"],
        tmp_path,
        slots=("action", "planner"),
        planner={"max_batch_size": 1, "warm_up": {"prompt_buckets": [64]}, "timeout_ms": 20_000},
        telemetry=telemetry,
        max_batch_size=1,
    )
    try:
        engine.wait_for(READY)
        with GrpcPolicy("127.0.0.1", engine.grpc_port) as client:
            client.infer(observation, traceparent=f"00-{TRACE_ID}-{ROBOT_SPAN_ID}-01", timeout_s=60)
        for port, sample in (
            (gateway_metrics, 'openpi_flash_requests_total{code="OK",method="PolicyService/InferStream"} 1.0'),
            (gateway_metrics, 'openpi_flash_subtasks_total{status="fresh"} 1.0'),
            (action_metrics, "openpi_flash_model_seconds_count 1.0"),
            (planner_metrics, 'openpi_flash_requests_total{code="OK",method="PlannerService/GenerateSubtask"} 1.0'),
        ):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                assert sample in page.read().decode()
        assert engine.stop() == 0  # sends what is left
        deadline = time.monotonic() + 20
        while [span.name for span in collector.spans].count("model") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        engine.process.kill()
        collector.stop()
    ours = {span.span_id.hex(): span for span in collector.spans if span.trace_id.hex() == TRACE_ID}
    paths = set()
    for span in ours.values():
        path = [span.name]
        while span.parent_span_id.hex() != ROBOT_SPAN_ID:
            span = ours[span.parent_span_id.hex()]  # noqa: PLW2901
            path.append(span.name)
        paths.add(tuple(path))
    assert ("model", "ActionService/InferStream", "PolicyService/InferStream") in paths
    assert ("model", "PlannerService/GenerateSubtask", "PolicyService/InferStream") in paths
    assert collector.services == {"openpi-flash-gateway", "openpi-flash-action", "openpi-flash-planner"}
