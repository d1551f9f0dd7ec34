//! The `server` subcommand.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use openpi_flash_edge::{Edge, EndpointSettings, Identity, Limits, Settings, Timeouts, Tokens, UpstreamSettings};
use openpi_flash_quic::Tuning;
use openpi_flash_quic::tls::Certified;

use crate::traces::TraceArguments;
use crate::{Fatal, read_token, stop_signal};

#[derive(Args)]
pub struct ServerArguments {
    /// Gateway of the action port: unix:/path, host:port or https://host:port. Without it there is no action port.
    #[arg(long, env = "OPENPI_FLASH_ACTION_UPSTREAM", required_unless_present = "planner_upstream")]
    action_upstream: Option<String>,
    /// UDP address of the action port.
    #[arg(long, env = "OPENPI_FLASH_ACTION_LISTEN", default_value = "0.0.0.0:5555")]
    action_listen: SocketAddr,
    /// Gateway of the planner port. Without it there is no planner port.
    #[arg(long, env = "OPENPI_FLASH_PLANNER_UPSTREAM")]
    planner_upstream: Option<String>,
    /// UDP address of the planner port.
    #[arg(long, env = "OPENPI_FLASH_PLANNER_LISTEN", default_value = "0.0.0.0:5556")]
    planner_listen: SocketAddr,
    /// PEM file of the CA of an https gateway [default: the authorities that this machine trusts].
    #[arg(long, env = "OPENPI_FLASH_UPSTREAM_CA_FILE")]
    upstream_ca_file: Option<PathBuf>,
    /// File whose first line is the bearer token that the gateway asks for.
    #[arg(long, env = "OPENPI_FLASH_UPSTREAM_TOKEN_FILE")]
    upstream_token_file: Option<PathBuf>,
    /// PEM file of the certificate chain [default: self-signed, made at the first start and kept].
    #[arg(long, env = "OPENPI_FLASH_CERT_FILE", requires = "key_file")]
    cert_file: Option<PathBuf>,
    /// PEM file of the certificate's private key.
    #[arg(long, env = "OPENPI_FLASH_KEY_FILE", requires = "cert_file")]
    key_file: Option<PathBuf>,
    /// Names in the self-signed certificate.
    #[arg(long, env = "OPENPI_FLASH_NAMES", value_delimiter = ',', default_value = "localhost,127.0.0.1")]
    names: Vec<String>,
    /// Folder of what must outlive a restart: certificate and keys.
    #[arg(long, env = "OPENPI_FLASH_STATE_DIR", default_value_os_t = default_state_dir())]
    state_dir: PathBuf,
    /// PEM file of the CA of clients' certificates; with it, clients must have one.
    #[arg(long, env = "OPENPI_FLASH_CLIENT_CA_FILE")]
    client_ca_file: Option<PathBuf>,
    /// File of accepted bearer tokens, one a line; with it, clients must have one.
    #[arg(long, env = "OPENPI_FLASH_TOKENS_FILE")]
    tokens_file: Option<PathBuf>,
    /// TCP address of Prometheus metrics and /healthz [default: none].
    #[arg(long, env = "OPENPI_FLASH_METRICS_LISTEN")]
    metrics_listen: Option<SocketAddr>,
    /// Most connections.
    #[arg(long, env = "OPENPI_FLASH_MAX_CONNECTIONS", default_value_t = Limits::default().connections)]
    max_connections: usize,
    /// Most connections of one address (IPv6: of one /64).
    #[arg(long, env = "OPENPI_FLASH_MAX_CONNECTIONS_PER_ADDRESS",
          default_value_t = Limits::default().connections_per_address)]
    max_connections_per_address: usize,
    /// Most handshakes at once of one address.
    #[arg(long, env = "OPENPI_FLASH_MAX_HANDSHAKES_PER_ADDRESS",
          default_value_t = Limits::default().handshakes_per_address)]
    max_handshakes_per_address: usize,
    /// Handshakes at once beyond which a client must show that it has its address.
    #[arg(long, env = "OPENPI_FLASH_HANDSHAKES_BEFORE_RETRY",
          default_value_t = Limits::default().handshakes_before_retry)]
    handshakes_before_retry: usize,
    /// Most requests at once of one connection.
    #[arg(long, env = "OPENPI_FLASH_MAX_STREAMS", default_value_t = Limits::default().streams)]
    max_streams: u32,
    /// Most requests at once that the gateways are asked.
    #[arg(long, env = "OPENPI_FLASH_MAX_IN_FLIGHT", default_value_t = Limits::default().requests)]
    max_in_flight: usize,
    /// Largest request and largest answer, in bytes, up to 64 MiB.
    #[arg(long, env = "OPENPI_FLASH_MAX_MESSAGE_BYTES", default_value_t = Limits::default().body_bytes)]
    max_message_bytes: usize,
    /// Most bytes of requests in flight of one connection.
    #[arg(long, env = "OPENPI_FLASH_MAX_CONNECTION_BYTES", default_value_t = Limits::default().connection_bytes)]
    max_connection_bytes: usize,
    /// Most bytes of requests in flight of all connections.
    #[arg(long, env = "OPENPI_FLASH_MAX_TOTAL_BYTES", default_value_t = Limits::default().total_bytes)]
    max_total_bytes: usize,
    /// Time from a robot's first packet to its hello, in milliseconds.
    #[arg(long, env = "OPENPI_FLASH_HANDSHAKE_TIMEOUT_MS", default_value_t = 5_000)]
    handshake_timeout_ms: u64,
    /// Time from a request's first byte to its last, and for an answer to be taken, in milliseconds.
    #[arg(long, env = "OPENPI_FLASH_TRANSFER_TIMEOUT_MS", default_value_t = 10_000)]
    transfer_timeout_ms: u64,
    /// Time of a request that names no deadline, in milliseconds.
    #[arg(long, env = "OPENPI_FLASH_DEFAULT_TIMEOUT_MS", default_value_t = 30_000)]
    default_timeout_ms: u64,
    /// Time for what is in flight when the program is told to stop, in milliseconds.
    #[arg(long, env = "OPENPI_FLASH_DRAIN_TIMEOUT_MS", default_value_t = 30_000)]
    drain_timeout_ms: u64,
    /// Silence after which a robot counts as gone, in milliseconds; the robot may ask for less.
    #[arg(long, env = "OPENPI_FLASH_IDLE_TIMEOUT_MS", default_value_t = 10_000)]
    idle_timeout_ms: u64,
    #[command(flatten)]
    traces: TraceArguments,
}

/// Serves until it is told to stop.
pub async fn run(arguments: ServerArguments) -> Result<(), Fatal> {
    let stop = stop_signal()?;
    let settings = settings(arguments)?;
    let traces = settings.traces.clone();
    let edge = Edge::bind(settings).await?;
    for (slot, address) in edge.addresses()? {
        tracing::info!(slot, %address, "listening");
    }
    if let Some(address) = edge.metrics_address() {
        tracing::info!(%address, "metrics");
    }
    edge.serve(stop).await;
    traces.shutdown().await;
    Ok(())
}

fn settings(arguments: ServerArguments) -> Result<Settings, Fatal> {
    let certified = match (&arguments.cert_file, &arguments.key_file) {
        (Some(cert), Some(key)) => Some(Certified::load(cert, key)?),
        _ => None,
    };
    let identity = Identity::load_or_create(&arguments.state_dir, certified, &arguments.names)?;
    tracing::info!(fingerprint = %identity.certified.fingerprint(), "certificate");
    let token = arguments.upstream_token_file.as_deref().map(read_token).transpose()?;
    let ports = [
        ("action", arguments.action_listen, arguments.action_upstream),
        ("planner", arguments.planner_listen, arguments.planner_upstream),
    ];
    let endpoint = |(slot, listen, address): (_, _, Option<String>)| {
        let (ca_file, token) = (arguments.upstream_ca_file.clone(), token.clone());
        Some(EndpointSettings { slot, listen, upstream: UpstreamSettings { address: address?, ca_file, token } })
    };
    Ok(Settings {
        endpoints: ports.into_iter().filter_map(endpoint).collect(),
        identity,
        client_ca: arguments.client_ca_file,
        tokens: arguments.tokens_file.as_deref().map(Tokens::load).transpose()?,
        limits: Limits {
            connections: arguments.max_connections,
            connections_per_address: arguments.max_connections_per_address,
            handshakes_per_address: arguments.max_handshakes_per_address,
            handshakes_before_retry: arguments.handshakes_before_retry,
            streams: arguments.max_streams,
            requests: arguments.max_in_flight,
            body_bytes: arguments.max_message_bytes,
            connection_bytes: arguments.max_connection_bytes,
            total_bytes: arguments.max_total_bytes,
        },
        timeouts: Timeouts {
            handshake: Duration::from_millis(arguments.handshake_timeout_ms),
            transfer: Duration::from_millis(arguments.transfer_timeout_ms),
            request: Duration::from_millis(arguments.default_timeout_ms),
            drain: Duration::from_millis(arguments.drain_timeout_ms),
        },
        tuning: Tuning {
            keep_alive: None, // robots probe; a server that did would keep those that left
            idle_timeout: Duration::from_millis(arguments.idle_timeout_ms),
            ..Tuning::default()
        },
        metrics: arguments.metrics_listen,
        traces: arguments.traces.start("openpi-flash-edge")?,
    })
}

/// `$XDG_STATE_HOME/openpi-flash`, by default below the home folder.
fn default_state_dir() -> PathBuf {
    let below_home = || std::env::home_dir().map(|home| home.join(".local/state"));
    let base = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).or_else(below_home);
    base.unwrap_or_else(|| PathBuf::from("/var/lib")).join("openpi-flash")
}
