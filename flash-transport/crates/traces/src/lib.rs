//! Spans of requests: the caller's W3C trace context in, that of the span out, and the span to an OTLP collector.
//!
//! Without a collector nothing is recorded, and the caller's context is handed on as it came. A collector that is away
//! costs spans, never a request: they wait in a bounded queue that a thread of its own empties.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Span as _, SpanBuilder, SpanKind, Status, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, Span as SdkSpan,
};
use tonic::transport::{ClientTlsConfig, Endpoint};

/// How long spans wait for company on their way to the collector.
const DELAY: Duration = Duration::from_secs(1);

/// Longest that a connection to the collector, or an answer of it, is waited for.
const TIMEOUT: Duration = Duration::from_secs(3);

/// A collector that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("OTLP endpoint {endpoint}: {problem}; http://host:port or https://host:port is expected")]
pub struct TracesError {
    endpoint: String,
    problem: String,
}

/// Where spans go. Cheap to clone; the default is nowhere.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Recorder>>);

struct Recorder {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// To the collector at `endpoint`, as spans of `service`. What the caller decided about its trace is kept to; of
    /// the others `sample_ratio` is recorded. Called within a tokio runtime, on which the spans are sent.
    pub fn to(endpoint: &str, service: &'static str, sample_ratio: f64) -> Result<Self, TracesError> {
        let problem = |problem: String| TracesError { endpoint: endpoint.to_owned(), problem };
        let mut channel = Endpoint::from_shared(endpoint.to_owned()).map_err(|error| problem(error.to_string()))?;
        match channel.uri().scheme_str() {
            Some("http") => {}
            Some("https") => {
                let tls = ClientTlsConfig::new().with_native_roots();
                channel = channel.tls_config(tls).map_err(|error| problem(error.to_string()))?;
            }
            _ => return Err(problem("unknown scheme".into())),
        }
        let channel = channel.connect_timeout(TIMEOUT).timeout(TIMEOUT).connect_lazy();
        let exporter = SpanExporter::builder().with_tonic().with_channel(channel).with_timeout(TIMEOUT).build();
        let exporter = exporter.map_err(|error| problem(error.to_string()))?;
        let batches = BatchConfigBuilder::default().with_scheduled_delay(DELAY).build();
        let provider = SdkTracerProvider::builder()
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(sample_ratio))))
            .with_resource(
                Resource::builder()
                    .with_service_name(service)
                    .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
                    .build(),
            )
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
            .build();
        let tracer = provider.tracer("openpi_flash");
        Ok(Self(Some(Arc::new(Recorder { provider, tracer }))))
    }

    /// The span `program method` of a request that began at `started`. It is a child of the caller's, whose context
    /// (`traceparent`, `tracestate`) is replaced by its own. A context that cannot be read begins a trace.
    pub fn begin(
        &self,
        program: &str,
        method: &'static str,
        started: Instant,
        (traceparent, tracestate): (&mut String, &mut String),
    ) -> Span {
        let Some(recorder) = &self.0 else { return Span(None) };
        let caller = Caller { traceparent, tracestate };
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &caller);
        let builder = SpanBuilder::from_name(format!("{program} {method}"))
            .with_kind(SpanKind::Server)
            .with_attributes([KeyValue::new("method", method)])
            .with_start_time(SystemTime::now() - started.elapsed());
        let span = recorder.tracer.build_with_context(builder, &parent);
        let context = span.span_context();
        let (trace_id, span_id, flags) = (context.trace_id(), context.span_id(), context.trace_flags().to_u8());
        *traceparent = format!("00-{trace_id}-{span_id}-{flags:02x}");
        *tracestate = context.trace_state().header();
        Span(Some(span))
    }

    /// Sends what is left, for a few seconds at most. What begins later is not recorded.
    pub async fn shutdown(&self) {
        if let Some(recorder) = self.0.clone() {
            // It waits for the thread that sends; spans that do not arrive in time are lost.
            let _ = tokio::task::spawn_blocking(move || recorder.provider.shutdown_with_timeout(TIMEOUT)).await;
        }
    }
}

impl std::fmt::Debug for Traces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Traces(on)" } else { "Traces(off)" })
    }
}

/// A request being traced. Dropped before its end, it counts as cancelled.
pub struct Span(Option<SdkSpan>);

impl Span {
    /// Notes something about the request.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(span) = &mut self.0 {
            span.set_attribute(KeyValue::new(key, value));
        }
    }

    /// The request is over, with this gRPC status.
    pub fn end(mut self, status: &'static str) {
        self.finish(status);
    }

    fn finish(&mut self, status: &'static str) {
        if let Some(mut span) = self.0.take() {
            span.set_attribute(KeyValue::new("status", status));
            if status != "OK" {
                span.set_status(Status::error(status)); // a message may hold what the robot sent
            }
            span.end();
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        self.finish("CANCELLED");
    }
}

/// A trace context as it came; what is empty is not there.
struct Caller<'a> {
    traceparent: &'a str,
    tracestate: &'a str,
}

impl Extractor for Caller<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let value = match key {
            "traceparent" => self.traceparent,
            "tracestate" => self.tracestate,
            _ => "",
        };
        (!value.is_empty()).then_some(value)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN_ID: &str = "b7ad6b7169203331";
    /// Where nobody listens.
    const NOWHERE: &str = "http://127.0.0.1:9";

    /// What a request goes on with.
    fn handed_on(traces: &Traces, traceparent: &str, tracestate: &str) -> (String, String) {
        let (mut traceparent, mut tracestate) = (traceparent.to_owned(), tracestate.to_owned());
        traces.begin("edge", "Infer", Instant::now(), (&mut traceparent, &mut tracestate)).end("OK");
        (traceparent, tracestate)
    }

    #[test]
    fn without_a_collector_the_callers_context_is_handed_on_as_it_came() {
        for context in [("", ""), ("00-x", "a=b"), (&format!("00-{TRACE_ID}-{SPAN_ID}-01"), "a=b")] {
            assert_eq!(handed_on(&Traces::default(), context.0, context.1), (context.0.into(), context.1.into()));
        }
    }

    #[tokio::test]
    async fn a_span_is_its_callers_child_and_keeps_to_what_the_caller_decided() {
        let traces = Traces::to(NOWHERE, "test", 1.0).unwrap();
        for flags in ["00", "01"] {
            let (traceparent, tracestate) = handed_on(&traces, &format!("00-{TRACE_ID}-{SPAN_ID}-{flags}"), "a=b");
            assert!(traceparent.starts_with(&format!("00-{TRACE_ID}-")), "{traceparent}");
            assert!(traceparent.ends_with(&format!("-{flags}")), "{traceparent}");
            assert!(!traceparent.contains(SPAN_ID), "{traceparent}");
            assert_eq!(tracestate, "a=b");
        }
        traces.shutdown().await;
    }

    #[tokio::test]
    async fn what_no_caller_decided_is_sampled() {
        for (ratio, flags) in [(0.0, "00"), (1.0, "01")] {
            let traces = Traces::to(NOWHERE, "test", ratio).unwrap();
            for caller in ["", "nonsense", &format!("00-{}-{SPAN_ID}-01", "0".repeat(32))] {
                let (traceparent, _) = handed_on(&traces, caller, "");
                assert_eq!(traceparent.len(), 55);
                assert!(traceparent.ends_with(&format!("-{flags}")), "{traceparent}");
            }
            traces.shutdown().await;
        }
    }

    #[tokio::test]
    async fn a_collector_that_is_away_costs_spans_alone() {
        let traces = Traces::to(NOWHERE, "test", 1.0).unwrap();
        for _ in 0..10_000 {
            handed_on(&traces, "", ""); // more than the queue holds
        }
        traces.shutdown().await;
        handed_on(&traces, "", "");
    }

    #[tokio::test]
    async fn an_endpoint_that_is_none_is_said() {
        for endpoint in ["", "localhost:4317", "ftp://localhost", "http://"] {
            let error = Traces::to(endpoint, "test", 1.0).unwrap_err().to_string();
            assert!(error.contains("http://host:port"), "{error}");
        }
    }
}
