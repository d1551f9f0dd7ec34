"""Traces reach a collector with their parents, metrics can be scraped, and what is off is not even imported."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from openpi_flash.v1 import action_pb2_grpc, inference_pb2
from opentelemetry.proto.trace.v1 import trace_pb2
from prometheus_client.parser import text_string_to_metric_families

from openpi_flash_common.errors import InvalidArgumentError
from openpi_flash_common.grpc_server import GrpcServer
from openpi_flash_common.settings import SettingsError, TelemetrySettings
from openpi_flash_common.telemetry import NO_TRACE, Span, Telemetry, TraceContext, current_span, setup
from tests.collector import Collector

SERVICE = "openpi_flash.v1.ActionService"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = TraceContext(f"00-{TRACE_ID}-{SPAN_ID}-01", "vendor=1")


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


def scrape(telemetry: Telemetry) -> dict[tuple[str, ...], float]:
    """Samples by name and label values, these in the order of the labels' names."""
    url = f"http://127.0.0.1:{telemetry.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_spans_reach_the_collector_below_their_caller(collector):
    telemetry = setup(TelemetrySettings(otlp_endpoint=collector.endpoint), "action")
    with telemetry.request("ActionService/Infer", CALLER) as request:
        assert current_span() is request
        assert request.trace_id == TRACE_ID
        assert request.context.traceparent.startswith(f"00-{TRACE_ID}-")
        assert request.context.tracestate == "vendor=1"
        with telemetry.span("prepare", request, cameras=3):
            pass
        now = time.monotonic()
        telemetry.record("model", request, now - 0.25, now, batch_size=2)
    assert current_span().context == NO_TRACE
    telemetry.shutdown()

    assert collector.services == {"openpi-flash-action"}
    infer, prepared, model = (collector.named(name) for name in ("ActionService/Infer", "prepare", "model"))
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert infer.parent_span_id.hex() == SPAN_ID
    assert prepared.parent_span_id == model.parent_span_id == infer.span_id
    assert infer.kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert {item.key: item.value.int_value for item in prepared.attributes} == {"cameras": 3}
    assert (model.end_time_unix_nano - model.start_time_unix_nano) / 1e9 == pytest.approx(0.25, abs=1e-6)
    assert infer.start_time_unix_nano / 1e9 == pytest.approx(time.time(), abs=60)


def test_a_failed_request_is_marked_without_its_message(collector):
    telemetry = setup(TelemetrySettings(otlp_endpoint=collector.endpoint), "action")
    with pytest.raises(InvalidArgumentError), telemetry.request("Infer"):
        raise InvalidArgumentError("prompt: something private")
    telemetry.shutdown()
    status = collector.named("Infer").status
    assert (status.code, status.message) == (trace_pb2.Status.STATUS_CODE_ERROR, "InvalidArgumentError")


@pytest.mark.parametrize(("caller", "expected"), [(NO_TRACE, 0), (CALLER, 1)])
def test_the_callers_sampling_decision_holds(caller, expected, collector):
    telemetry = setup(TelemetrySettings(otlp_endpoint=collector.endpoint, trace_sample_ratio=0), "action")
    with telemetry.request("Infer", caller):
        pass
    telemetry.shutdown()
    assert len(collector.spans) == expected


def test_a_collector_out_of_reach_holds_up_nothing():
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        telemetry = setup(TelemetrySettings(otlp_endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}"), "action")
        with telemetry.request("Infer"):
            pass
        stopping = threading.Thread(target=telemetry.shutdown)
        stopping.start()
        stopping.join(20)
        assert not stopping.is_alive()


def test_without_tracing_the_callers_context_is_handed_on():
    telemetry = setup(TelemetrySettings(), "gateway")
    assert telemetry.metrics_port is None
    with telemetry.request("Infer", CALLER) as request, telemetry.span("inner", request) as inner:
        assert type(inner) is Span
        assert inner.context == CALLER
        assert current_span().trace_id == TRACE_ID
    telemetry.record("model", request, 0, 1)
    telemetry.metrics.requests.labels("Infer", "OK").inc()
    telemetry.shutdown()


def test_what_is_off_is_not_imported():
    program = (
        "import sys; from openpi_flash_common import grpc_server, logs, settings, telemetry;"
        "telemetry.setup(settings.TelemetrySettings(), 'action');"
        "sys.exit(any(name.startswith(('opentelemetry', 'prometheus_client')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_context_from_and_to_metadata():
    pairs = (("user-agent", "x"), ("traceparent", CALLER.traceparent), ("tracestate", "vendor=1"), ("bin-bin", b"\0"))
    assert TraceContext.from_metadata(pairs) == CALLER
    assert CALLER.to_metadata() == pairs[1:3]
    assert TraceContext.from_metadata(None) is NO_TRACE
    assert NO_TRACE.to_metadata() == ()


async def test_requests_are_counted_by_method_and_status():
    telemetry = setup(TelemetrySettings(metrics=True, action_metrics_port=0), "action")
    for error in (None, InvalidArgumentError("x"), RuntimeError("x"), asyncio.CancelledError()):
        try:
            with telemetry.request("Infer"):
                assert (await asyncio.to_thread(scrape, telemetry))["openpi_flash_requests_in_flight", "Infer"] == 1
                if error is not None:
                    raise error
        except (InvalidArgumentError, RuntimeError, asyncio.CancelledError):
            pass
    telemetry.metrics.queue_depth.set(3)
    telemetry.metrics.batch_size.observe(2)
    samples = await asyncio.to_thread(scrape, telemetry)
    for code in ("OK", "INVALID_ARGUMENT", "INTERNAL", "CANCELLED"):
        assert samples["openpi_flash_requests_total", code, "Infer"] == 1
    assert samples["openpi_flash_requests_in_flight", "Infer"] == 0
    assert samples["openpi_flash_request_seconds_count", "Infer"] == 4
    assert samples["openpi_flash_queue_depth",] == 3
    assert samples["openpi_flash_batch_size_sum",] == 2


def test_a_metrics_port_that_is_taken_says_so():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"telemetry\.action_metrics_port: .*{port}"):
            setup(TelemetrySettings(metrics=True, action_metrics_port=port), "action")


class Servicer(action_pb2_grpc.ActionServiceServicer):
    async def Reset(self, request, context):
        return inference_pb2.ResetResponse()

    async def GetMetadata(self, request, context):
        return inference_pb2.GetMetadataResponse(model_config_name="x" * 100)


async def test_the_server_counts_bytes_and_takes_the_trace_from_metadata(collector):
    telemetry = setup(
        TelemetrySettings(otlp_endpoint=collector.endpoint, metrics=True, action_metrics_port=0), "action"
    )
    register = {SERVICE: lambda server: action_pb2_grpc.add_ActionServiceServicer_to_server(Servicer(), server)}
    server = GrpcServer(register, ["127.0.0.1:0"], telemetry)
    await server.start()
    running = asyncio.ensure_future(server.run_until_stopped())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports[0]}") as channel:
        stub = action_pb2_grpc.ActionServiceStub(channel)
        request = inference_pb2.ResetRequest(session_id="s" * 1000)
        await stub.Reset(request, metadata=CALLER.to_metadata(), timeout=10)
        response = await stub.GetMetadata(inference_pb2.GetMetadataRequest(), timeout=10)
    server.stop()
    await running
    await asyncio.to_thread(telemetry.shutdown)

    samples = await asyncio.to_thread(scrape, telemetry)
    assert samples["openpi_flash_received_bytes_total", "ActionService/Reset"] == request.ByteSize()
    assert samples["openpi_flash_sent_bytes_total", "ActionService/GetMetadata"] == response.ByteSize()
    assert samples["openpi_flash_requests_total", "OK", "ActionService/Reset"] == 1
    assert collector.named("ActionService/Reset").parent_span_id.hex() == SPAN_ID
    assert not collector.named("ActionService/GetMetadata").parent_span_id
