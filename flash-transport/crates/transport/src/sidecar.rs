//! The `client` subcommand: ordinary gRPC from the robot's programs, QUIC to the server.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{ArgGroup, Args};
use futures_util::FutureExt;
use openpi_flash_client::{Call, Certified, Client, Error, Fingerprint, Method, Options, Refusal, Trust};
use openpi_flash_grpc::{CallContext, Handler, PolicyServer};
use openpi_flash_traces::Traces;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};

use crate::traces::TraceArguments;
use crate::{Fatal, read_token, stop_signal};

#[derive(Args)]
#[command(group = ArgGroup::new("trust"))]
pub struct SidecarArguments {
    /// Server, as host:port; the port may be left out.
    #[arg(env = "OPENPI_FLASH_SERVER")]
    server: String,
    /// Where gRPC is served: unix:/path or an address of this machine, such as 127.0.0.1:50051.
    #[arg(long, env = "OPENPI_FLASH_LISTEN", default_value = "127.0.0.1:50051")]
    listen: String,
    /// Name that the server's certificate must have [default: the server's].
    #[arg(long, env = "OPENPI_FLASH_SERVER_NAME")]
    server_name: Option<String>,
    /// PEM file of the CA of the server's certificate [default: the authorities that this machine trusts].
    #[arg(long, env = "OPENPI_FLASH_CA_FILE", group = "trust")]
    ca_file: Option<PathBuf>,
    /// SHA-256 fingerprint of the server's certificate, which the server logs when it starts.
    #[arg(long, env = "OPENPI_FLASH_FINGERPRINT", group = "trust")]
    fingerprint: Option<Fingerprint>,
    /// Trust any certificate. Whoever is on the way can then read and change everything.
    #[arg(long, env = "OPENPI_FLASH_INSECURE_SKIP_VERIFY", group = "trust")]
    insecure_skip_verify: bool,
    /// PEM file of this robot's certificate.
    #[arg(long, env = "OPENPI_FLASH_CERT_FILE", requires = "key_file")]
    cert_file: Option<PathBuf>,
    /// PEM file of that certificate's private key.
    #[arg(long, env = "OPENPI_FLASH_KEY_FILE", requires = "cert_file")]
    key_file: Option<PathBuf>,
    /// File whose first line is the bearer token that the server asks for.
    #[arg(long, env = "OPENPI_FLASH_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Time of a call without a deadline, in milliseconds.
    #[arg(long, env = "OPENPI_FLASH_DEFAULT_TIMEOUT_MS", default_value_t = 30_000)]
    default_timeout_ms: u64,
    /// Longest that a call waits for a connection, in milliseconds.
    #[arg(long, env = "OPENPI_FLASH_CONNECT_TIMEOUT_MS", default_value_t = 5_000)]
    connect_timeout_ms: u64,
    /// How often an idle connection is probed, in milliseconds.
    #[arg(long, env = "OPENPI_FLASH_KEEP_ALIVE_MS", default_value_t = 300)]
    keep_alive_ms: u64,
    /// Silence after which the server counts as gone, in milliseconds.
    #[arg(long, env = "OPENPI_FLASH_IDLE_TIMEOUT_MS", default_value_t = 1_000)]
    idle_timeout_ms: u64,
    #[command(flatten)]
    traces: TraceArguments,
}

const DEFAULT_PORT: u16 = 5555;

/// Bytes that a program may send before it is told to go on: an observation, so that it comes in one go.
const HTTP2_WINDOW: u32 = 4 << 20;

/// For programs of the robot that hold their connections when the sidecar is told to stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves until it is told to stop.
pub async fn run(arguments: SidecarArguments) -> Result<(), Fatal> {
    let stop = stop_signal()?.shared();
    let options = options(&arguments)?;
    let max_bytes = options.max_answer_bytes;
    let client = Client::new(options)?;
    let (reporter, health) = health_reporter();
    reporter.set_not_serving::<PolicyServer<Forwarder>>().await;
    tokio::spawn(report_health(reporter, client.clone()));
    let traces = arguments.traces.start("openpi-flash-sidecar")?;
    let forwarder = Forwarder { client: client.clone(), traces: traces.clone() };
    let forwarder = PolicyServer::new(forwarder, max_bytes, stop.clone());
    let server = Server::builder()
        .initial_stream_window_size(HTTP2_WINDOW)
        .initial_connection_window_size(HTTP2_WINDOW)
        .add_service(health)
        .add_service(forwarder);
    let problem = |error| format!("cannot listen on {}: {error}", arguments.listen);
    match arguments.listen.strip_prefix("unix:").map(Path::new) {
        Some(path) => {
            remove_stale(path)?;
            let listener = UnixListener::bind(path).map_err(problem)?;
            tracing::info!(address = arguments.listen, "listening");
            let served = server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.clone());
            at_most_after(stop, served).await?;
            let _ = std::fs::remove_file(path);
        }
        None => {
            let address: SocketAddr = arguments.listen.parse().map_err(|_| {
                format!("{}: unix:/path or an address such as 127.0.0.1:50051 is expected", arguments.listen)
            })?;
            if !address.ip().is_loopback() {
                return Err(
                    format!("{address}: gRPC without TLS is for this machine alone; use a loopback address").into()
                );
            }
            let listener = TcpListener::bind(address).await.map_err(problem)?;
            tracing::info!(address = %listener.local_addr()?, "listening");
            let served =
                server.serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), stop.clone());
            at_most_after(stop, served).await?;
        }
    }
    client.close().await;
    traces.shutdown().await;
    Ok(())
}

/// Serves until it is told to stop, and then until the robot's programs have let go, or the time for that is over.
async fn at_most_after(
    stop: impl Future<Output = ()>,
    served: impl Future<Output = Result<(), tonic::transport::Error>>,
) -> Result<(), tonic::transport::Error> {
    tokio::select! {
        result = served => result,
        () = async { stop.await; tokio::time::sleep(DRAIN_TIMEOUT).await } => Ok(()),
    }
}

/// Answers gRPC calls with the server's answers. A call without a session is in the sidecar's own.
struct Forwarder {
    client: Client,
    traces: Traces,
}

impl Handler for Forwarder {
    async fn call(&self, method: Method, body: Bytes, context: CallContext) -> Result<Bytes, Refusal> {
        let CallContext { timeout, mut traceparent, mut tracestate } = context;
        let now = Instant::now();
        let mut span = self.traces.begin("sidecar", method.name(), now, (&mut traceparent, &mut tracestate));
        span.set("request_bytes", i64::try_from(body.len()).unwrap_or(i64::MAX));
        let call = Call { timeout, session: None, traceparent, tracestate };
        let answer = self.client.call(method, body, call).await;
        let answer = answer.map(|answer| answer.body).map_err(|error: Error| error.refusal());
        span.end(answer.as_ref().map_or_else(|refusal| refusal.code.name(), |_| "OK"));
        answer
    }
}

/// The health of PolicyService follows the connection.
async fn report_health(reporter: HealthReporter, client: Client) {
    let mut connected = client.connected();
    drop(client);
    loop {
        let now = *connected.borrow_and_update();
        let status = if now { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status("", status).await;
        reporter.set_service_status(openpi_flash_grpc::SERVICE, status).await;
        if connected.changed().await.is_err() {
            return;
        }
    }
}

/// Removes the socket that a killed predecessor left, unless somebody listens on it.
fn remove_stale(path: &Path) -> Result<(), Fatal> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(format!("{}: another program listens on it", path.display()).into()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(std::fs::remove_file(path)?),
        Err(_) => Ok(()),
    }
}

fn options(arguments: &SidecarArguments) -> Result<Options, Fatal> {
    let (host, port) = match arguments.server.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
            (host, port.parse().map_err(|_| format!("{}: host:port is expected", arguments.server))?)
        }
        _ => (arguments.server.as_str(), DEFAULT_PORT),
    };
    let mut options = Options::new(host.trim_matches(['[', ']']), port);
    options.server_name.clone_from(&arguments.server_name);
    options.trust = match (&arguments.ca_file, arguments.fingerprint) {
        (Some(path), _) => Trust::CaFile(path.clone()),
        (_, Some(fingerprint)) => Trust::Fingerprint(fingerprint),
        _ if arguments.insecure_skip_verify => Trust::InsecureAnyCertificate,
        _ => Trust::SystemRoots,
    };
    if let (Some(cert), Some(key)) = (&arguments.cert_file, &arguments.key_file) {
        options.certificate = Some(Certified::load(cert, key)?);
    }
    if let Some(path) = &arguments.token_file {
        options.token = read_token(path)?;
    }
    options.call_timeout = Duration::from_millis(arguments.default_timeout_ms);
    options.connect_timeout = Duration::from_millis(arguments.connect_timeout_ms);
    options.tuning.keep_alive = Some(Duration::from_millis(arguments.keep_alive_ms));
    options.tuning.idle_timeout = Duration::from_millis(arguments.idle_timeout_ms);
    Ok(options)
}
