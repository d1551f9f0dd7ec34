//! Prometheus metrics, and the HTTP port that serves them.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Seconds: from below a millisecond, for one that needs no model, to a time-out's order.
const BUCKETS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// What is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    draining: AtomicBool,
    pub(crate) requests: Family<RequestLabels, Counter>,
    pub(crate) early_requests: Family<SlotLabels, Counter>,
    pub(crate) transfers: Family<TransferLabels, Counter>,
    pub(crate) seconds: Family<MethodLabels, Histogram>,
    pub(crate) receive_seconds: Family<MethodLabels, Histogram>,
    pub(crate) in_flight: Family<SlotLabels, Gauge>,
    pub(crate) connections: Family<SlotLabels, Gauge>,
    pub(crate) handshakes: Family<HandshakeLabels, Counter>,
    pub(crate) received_bytes: Family<SlotLabels, Counter>,
    pub(crate) sent_bytes: Family<SlotLabels, Counter>,
    pub(crate) sent_packets: Family<SlotLabels, Counter>,
    pub(crate) lost_packets: Family<SlotLabels, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct SlotLabels {
    pub slot: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct MethodLabels {
    pub slot: &'static str,
    pub method: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    pub slot: &'static str,
    pub method: &'static str,
    pub code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct HandshakeLabels {
    pub slot: &'static str,
    pub result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct TransferLabels {
    pub slot: &'static str,
    pub direction: &'static str,
    pub path: &'static str,
}

impl Metrics {
    pub(crate) fn new() -> Arc<Self> {
        let histogram = || Histogram::new(BUCKETS);
        let mut metrics = Self {
            registry: Registry::with_prefix("openpi_flash_edge"),
            draining: AtomicBool::new(false),
            requests: Family::default(),
            early_requests: Family::default(),
            transfers: Family::default(),
            seconds: Family::new_with_constructor(histogram),
            receive_seconds: Family::new_with_constructor(histogram),
            in_flight: Family::default(),
            connections: Family::default(),
            handshakes: Family::default(),
            received_bytes: Family::default(),
            sent_bytes: Family::default(),
            sent_packets: Family::default(),
            lost_packets: Family::default(),
        };
        let registry = &mut metrics.registry;
        registry.register("requests", "Requests answered, by gRPC status", metrics.requests.clone());
        let help = "Requests that came at 0-RTT, with the first packet of a connection";
        registry.register("early_requests", help, metrics.early_requests.clone());
        let help =
            "Requests (in) and answers (out), by what carried them: datagrams with error correction, or a stream";
        registry.register("transfers", help, metrics.transfers.clone());
        let help = "From a request's last byte to its answer";
        registry.register_with_unit("request", help, Unit::Seconds, metrics.seconds.clone());
        let help = "From a request's first byte to its last";
        registry.register_with_unit("request_receive", help, Unit::Seconds, metrics.receive_seconds.clone());
        registry.register("requests_in_flight", "Requests that the gateway is asked", metrics.in_flight.clone());
        registry.register("connections", "Clients that have said hello", metrics.connections.clone());
        registry.register("handshakes", "First packets of clients, by what became of them", metrics.handshakes.clone());
        registry.register("received_body_bytes", "Bytes of requests", metrics.received_bytes.clone());
        registry.register("sent_body_bytes", "Bytes of answers", metrics.sent_bytes.clone());
        registry.register("sent_packets", "QUIC packets sent, on connections that ended", metrics.sent_packets.clone());
        registry.register("lost_packets", "Of them, those deemed lost", metrics.lost_packets.clone());
        Arc::new(metrics)
    }

    /// Says on `/healthz` that the edge takes no more.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// All metrics in Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.registry) {
            let _ = write!(text, "# {error}");
        }
        text
    }

    /// `/metrics`, and `/healthz`, which is 503 while the edge drains.
    pub(crate) fn router(self: Arc<Self>) -> Router {
        Router::new()
            .route("/metrics", get(|State(metrics): State<Arc<Self>>| async move { metrics.text() }))
            .route(
                "/healthz",
                get(|State(metrics): State<Arc<Self>>| async move {
                    if metrics.draining.load(Ordering::Relaxed) {
                        (StatusCode::SERVICE_UNAVAILABLE, "draining\n")
                    } else {
                        (StatusCode::OK, "ok\n")
                    }
                }),
            )
            .with_state(self)
    }
}
