//! The ports: who is let in, and how they are closed.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use openpi_flash_quic::messages::warm_up;
use openpi_flash_quic::{accept_large_packets, code, socket, tls};
use openpi_flash_wire::CloseCode;
use quinn::{Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::connection::{Context, serve};
use crate::limits::{Admission, Budget, Gate};
use crate::metrics::{HandshakeLabels, Metrics};
use crate::upstream::Upstream;
use crate::{EdgeError, Settings, stranger};

/// Bytes that may wait until it is decided whether their sender is let in, which is at once: of one, and of all.
const INCOMING_BYTES: u64 = 1 << 20;
const ALL_INCOMING_BYTES: u64 = 16 << 20;

/// Open ports.
pub struct Edge {
    ports: Vec<Port>,
    gate: Arc<Gate>,
    metrics: Arc<Metrics>,
    metrics_listener: Option<TcpListener>,
    drain: watch::Sender<bool>,
    settings: Settings,
}

struct Port {
    endpoint: Endpoint,
    context: Arc<Context>,
}

impl Edge {
    /// Opens the ports. Called within a tokio runtime.
    pub async fn bind(settings: Settings) -> Result<Self, EdgeError> {
        warm_up();
        let tls = Arc::new(tls::server(&settings.identity.certified, settings.client_ca.as_deref())?);
        let tuning = stranger::narrowed(&settings.tuning, settings.limits.streams);
        let mut config = ServerConfig::with_crypto(tls);
        config
            .transport_config(Arc::new(tuning.transport()))
            .max_incoming(settings.limits.connections)
            .incoming_buffer_size(INCOMING_BYTES)
            .incoming_buffer_size_total(ALL_INCOMING_BYTES);
        let (drain, draining) = watch::channel(false);
        let metrics = Metrics::new();
        let (requests, bytes) = (Budget::new(settings.limits.requests), Budget::new(settings.limits.total_bytes));
        let mut ports = Vec::new();
        for each in &settings.endpoints {
            let listen = |source| EdgeError::Listen { address: each.listen, source };
            let socket = socket::bind(each.listen).map_err(listen)?;
            let endpoint =
                Endpoint::new(endpoint_config(&settings), Some(config.clone()), socket, Arc::new(TokioRuntime));
            let context = Context {
                slot: each.slot,
                upstream: Upstream::new(&each.upstream, settings.limits.body_bytes)?,
                tokens: settings.tokens.clone(),
                limits: settings.limits,
                connection_window: settings.tuning.connection_window,
                timeouts: settings.timeouts,
                metrics: Arc::clone(&metrics),
                traces: settings.traces.clone(),
                requests: Arc::clone(&requests),
                bytes: Arc::clone(&bytes),
                draining: draining.clone(),
            };
            ports.push(Port { endpoint: endpoint.map_err(listen)?, context: Arc::new(context) });
        }
        let metrics_listener = match settings.metrics {
            None => None,
            Some(address) => {
                let listener = TcpListener::bind(address).await;
                Some(listener.map_err(|source| EdgeError::Listen { address, source })?)
            }
        };
        Ok(Self { ports, gate: Gate::new(settings.limits), metrics, metrics_listener, drain, settings })
    }

    /// Slots and UDP addresses, in the order of the settings.
    pub fn addresses(&self) -> io::Result<Vec<(&'static str, SocketAddr)>> {
        self.ports.iter().map(|port| Ok((port.context.slot, port.endpoint.local_addr()?))).collect()
    }

    /// Where metrics are served.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_listener.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// What is counted.
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    /// Answers until `stop` resolves; then refuses what is new, finishes what is in flight, and tells every client to
    /// connect again.
    pub async fn serve(self, stop: impl Future<Output = ()>) {
        let mut tasks = JoinSet::new();
        if let Some(listener) = self.metrics_listener {
            let router = Arc::clone(&self.metrics).router();
            tasks.spawn(async move {
                if let Err(error) = axum::serve(listener, router).await {
                    tracing::error!(%error, "metrics are no longer served");
                }
            });
        }
        for port in &self.ports {
            tasks.spawn(accept(port.endpoint.clone(), Arc::clone(&port.context), Arc::clone(&self.gate)));
        }
        stop.await;
        tracing::info!("draining");
        self.metrics.drain();
        self.drain.send_replace(true);
        let drained = async {
            for port in &self.ports {
                port.endpoint.wait_idle().await; // each connection closes itself once its requests are answered
            }
        };
        if timeout(self.settings.timeouts.drain, drained).await.is_err() {
            tracing::warn!("not everything in flight was answered in the time for it");
        }
        for port in &self.ports {
            port.endpoint.close(code(CloseCode::Reconnect), b"the server is stopping");
            port.endpoint.wait_idle().await;
        }
        tasks.shutdown().await;
    }
}

/// Begins a task for each client that is let in.
async fn accept(endpoint: Endpoint, context: Arc<Context>, gate: Arc<Gate>) {
    let mut clients = JoinSet::new();
    while let Some(incoming) = endpoint.accept().await {
        while clients.try_join_next().is_some() {}
        let result = if *context.draining.borrow() {
            incoming.refuse();
            "draining"
        } else {
            match gate.admit(incoming.remote_address().ip(), incoming.remote_address_validated()) {
                Admission::Retry => retry(incoming),
                Admission::Refuse => {
                    incoming.refuse();
                    "refused"
                }
                Admission::Accept(place) => match incoming.accept().map(quinn::Connecting::into_0rtt) {
                    Ok(Ok((connection, accepted))) => {
                        clients.spawn(serve(Arc::clone(&context), connection, accepted, place));
                        "accepted"
                    }
                    _ => "failed",
                },
            }
        };
        let labels = HandshakeLabels { slot: context.slot, result };
        context.metrics.handshakes.get_or_create(&labels).inc();
    }
}

fn retry(incoming: Incoming) -> &'static str {
    match incoming.retry() {
        Ok(()) => "retried",
        Err(error) => {
            error.into_incoming().refuse();
            "refused"
        }
    }
}

fn endpoint_config(settings: &Settings) -> EndpointConfig {
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &settings.identity.reset_key);
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    accept_large_packets(&mut config);
    let connection_id_key = settings.identity.connection_id_key;
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(connection_id_key)));
    config
}
