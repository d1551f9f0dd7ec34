"""Traces (W3C context in, OTLP out) and Prometheus metrics of a service; next to nothing is done while they are off.

Neither SDK is imported unless it is configured. Times are `time.monotonic()` seconds.
"""

import asyncio
import contextlib
import importlib.metadata
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from openpi_flash_common.errors import ServiceError
from openpi_flash_common.settings import SettingsError, TelemetrySettings

Service = Literal["gateway", "action", "planner"]

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class TraceContext(NamedTuple):
    """Where a request stands in its caller's trace: W3C `traceparent` and `tracestate`; empty: no trace."""

    traceparent: str = ""
    tracestate: str = ""

    @classmethod
    def from_metadata(cls, pairs: Iterable[tuple[str, str | bytes]] | None) -> "TraceContext":
        """From gRPC metadata or HTTP headers (names in lower case)."""
        found = {key: value for key, value in pairs or () if key in ("traceparent", "tracestate")}
        return cls(str(found.get("traceparent", "")), str(found.get("tracestate", ""))) if found else NO_TRACE

    def to_metadata(self) -> tuple[tuple[str, str], ...]:
        """As gRPC metadata or HTTP headers; empty fields are left out."""
        return tuple((key, value) for key, value in zip(self._fields, self, strict=True) if value)


NO_TRACE = TraceContext()


class Span:
    """One timed operation: a context manager. This base is what happens while tracing is off: the caller's context is
    handed on, and logs show the caller's trace id.

    Attributes:
        context: the context to send along with calls to other services.
    """

    __slots__ = ("_token", "context")

    def __init__(self, context: TraceContext) -> None:
        self.context = context
        self._token: Token[Span] | None = None

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty: no trace."""
        match = _TRACEPARENT.fullmatch(self.context.traceparent)
        return match[1] if match else ""


_NO_SPAN = Span(NO_TRACE)
_current: ContextVar[Span] = ContextVar("openpi_flash_span")


def current_span() -> Span:
    """The innermost span that the calling task is in: in a unary handler, the request's own."""
    return _current.get(_NO_SPAN)


class Telemetry:
    """What a service records. Make one with `setup`.

    Attributes:
        metrics: instruments to count with; while metrics are off they do nothing.
        metrics_port: where metrics are served; None while they are off.
    """

    def __init__(self, tracer: "_Tracer | None" = None, metrics: "Metrics | None" = None) -> None:
        self._tracer = tracer
        self.metrics = metrics or Metrics(None)
        self.metrics_port: int | None = None

    def span(self, name: str, parent: Span | TraceContext = NO_TRACE, **attributes: str | int | float | bool) -> Span:
        """An operation to be timed by `with`."""
        if self._tracer is None:
            return Span(parent.context if isinstance(parent, Span) else parent)
        return self._tracer.start(name, parent, attributes)

    def record(self, name: str, parent: Span, start: float, end: float, **attributes: str | int | float | bool) -> None:
        """Records an operation that is over, from its times."""
        if self._tracer is not None:
            self._tracer.record(name, parent, start, end, attributes)

    def request(self, method: str, parent: TraceContext = NO_TRACE) -> contextlib.AbstractContextManager[Span]:
        """The handling of one request: a server span, and the request metrics with the status that it ends with."""
        if self._tracer is None and not self.metrics.enabled:
            return Span(parent)
        return self._request(method, parent)

    @contextlib.contextmanager
    def _request(self, method: str, parent: TraceContext) -> Iterator[Span]:
        metrics, start, code = self.metrics, time.monotonic(), "OK"
        metrics.in_flight.labels(method).inc()
        try:
            with self.span(method, parent) as span:
                yield span
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except BaseException as error:
            code = error.code.name if isinstance(error, ServiceError) else "INTERNAL"
            raise
        finally:
            metrics.in_flight.labels(method).dec()
            metrics.requests.labels(method, code).inc()
            metrics.request_seconds.labels(method).observe(time.monotonic() - start)

    def shutdown(self) -> None:
        """Sends what is left, for a few seconds at most."""
        if self._tracer is not None:
            self._tracer.shutdown()


def setup(settings: TelemetrySettings, service: Service) -> Telemetry:
    """Starts what is configured.

    Raises:
        SettingsError: the metrics port cannot be bound.
    """
    tracer = None
    if settings.otlp_endpoint is not None:
        tracer = _Tracer(settings.otlp_endpoint, settings.trace_sample_ratio, service)
    if not settings.metrics:
        return Telemetry(tracer)
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    prometheus_client.ProcessCollector(registry=registry)
    telemetry = Telemetry(tracer, Metrics(registry))
    port = getattr(settings, f"{service}_metrics_port")
    try:
        server, _ = prometheus_client.start_http_server(port, settings.metrics_host, registry)
    except OSError as error:
        raise SettingsError(
            f"telemetry.{service}_metrics_port: cannot listen on {settings.metrics_host}:{port}: {error.strerror}"
        ) from error
    telemetry.metrics_port = server.server_port
    return telemetry


class Metrics:
    """Instruments, all with the prefix `openpi_flash_`. Without a registry they do nothing."""

    def __init__(self, registry: Any) -> None:
        self.enabled = registry is not None

        def make(kind: str, name: str, help_text: str, labels: tuple[str, ...] = (), **options: Any) -> Any:
            if registry is None:
                return _NULL_INSTRUMENT
            import prometheus_client

            return getattr(prometheus_client, kind)(
                f"openpi_flash_{name}", help_text, labels, registry=registry, **options
            )

        seconds = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
        method = ("method",)
        self.requests = make("Counter", "requests", "Finished requests by gRPC status.", ("method", "code"))
        self.in_flight = make("Gauge", "requests_in_flight", "Requests being handled.", method)
        self.request_seconds = make(
            "Histogram", "request_seconds", "Time to handle a request.", method, buckets=seconds
        )
        self.received_bytes = make("Counter", "received_bytes", "Bytes of request messages.", method)
        self.sent_bytes = make("Counter", "sent_bytes", "Bytes of response messages.", method)
        self.subtasks = make(
            "Counter", "subtasks", "Actions with a planner before them, by the status of their subtask.", ("status",)
        )
        self.queue_depth = make("Gauge", "queue_depth", "Requests being prepared or waiting, and open streams.")
        self.queue_wait_seconds = make("Histogram", "queue_wait_seconds", "Wait for the accelerator.", buckets=seconds)
        self.batch_size = make(
            "Histogram", "batch_size", "Requests that shared a model call.", buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32)
        )
        self.model_seconds = make("Histogram", "model_seconds", "Time of a model call.", buckets=seconds)


class _NullInstrument:
    def labels(self, *_: str) -> "_NullInstrument":
        return self

    def inc(self, amount: float = 1) -> None: ...
    def dec(self, amount: float = 1) -> None: ...
    def set(self, value: float) -> None: ...
    def observe(self, amount: float) -> None: ...


_NULL_INSTRUMENT = _NullInstrument()


class _Tracer:
    """OpenTelemetry behind the two methods that services use."""

    def __init__(self, endpoint: str, sample_ratio: float, service: Service) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create(
            {
                "service.name": f"openpi-flash-{service}",
                "service.version": importlib.metadata.version("openpi-flash-common"),
            }
        )
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)), resource=resource, shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=3)
        self._processor = BatchSpanProcessor(exporter, schedule_delay_millis=1000)
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("openpi_flash")
        self._propagator = TraceContextTextMapPropagator()
        self._trace, self._new_context = trace, Context
        self._clock_offset_ns = time.time_ns() - time.monotonic_ns()

    def start(self, name: str, parent: Span | TraceContext, attributes: dict[str, Any]) -> "_RecordedSpan":
        kind = self._trace.SpanKind.INTERNAL if isinstance(parent, Span) else self._trace.SpanKind.SERVER
        span = self._tracer.start_span(name, self._context_of(parent), kind, attributes)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._trace.set_span_in_context(span, self._new_context()))
        return _RecordedSpan(span, TraceContext(**carrier))

    def record(self, name: str, parent: Span, start: float, end: float, attributes: dict[str, Any]) -> None:
        span = self._tracer.start_span(
            name, self._context_of(parent), attributes=attributes, start_time=self._epoch_ns(start)
        )
        span.end(self._epoch_ns(end))

    def shutdown(self) -> None:
        # The SDK's own shutdown has no limit of its own when the collector is out of reach.
        flushing = threading.Thread(target=self._processor.shutdown, daemon=True)
        flushing.start()
        flushing.join(3.0)

    def _context_of(self, parent: Span | TraceContext) -> Any:
        if isinstance(parent, _RecordedSpan):
            return self._trace.set_span_in_context(parent.span, self._new_context())
        context = parent.context if isinstance(parent, Span) else parent
        return self._propagator.extract(dict(context.to_metadata()), self._new_context())

    def _epoch_ns(self, moment: float) -> int:
        return int(moment * 1e9) + self._clock_offset_ns


class _RecordedSpan(Span):
    __slots__ = ("span",)

    def __init__(self, span: Any, context: TraceContext) -> None:
        super().__init__(context)
        self.span = span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            # The class says what went wrong; the message may hold what the robot sent.
            self.span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        self.span.end()
