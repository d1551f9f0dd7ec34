//! What can be set, parsed already.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use openpi_flash_quic::Tuning;
use openpi_flash_quic::tls::TlsError;
use openpi_flash_traces::Traces;
use subtle::ConstantTimeEq;

use crate::{Identity, Limits};

/// Why an edge does not start.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// A file cannot be used.
    #[error("{path}: {problem}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A gateway's address cannot be used.
    #[error("upstream {address}: {problem}")]
    Upstream {
        /// As it was given.
        address: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Everything that an edge is told.
#[derive(Debug)]
pub struct Settings {
    /// One UDP port each.
    pub endpoints: Vec<EndpointSettings>,
    /// Certificate and keys.
    pub identity: Identity,
    /// PEM file of the authority whose certificates clients must have; none: they need none.
    pub client_ca: Option<PathBuf>,
    /// Bearer tokens of which clients must have one; none: they need none.
    pub tokens: Option<Tokens>,
    /// What a peer cannot exceed.
    pub limits: Limits,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// Of QUIC.
    pub tuning: Tuning,
    /// Where Prometheus finds metrics; none: nowhere.
    pub metrics: Option<SocketAddr>,
    /// Where spans go.
    pub traces: Traces,
}

/// One port and the gateway behind it.
#[derive(Debug, Clone)]
pub struct EndpointSettings {
    /// `action` or `planner`: a label of metrics and logs.
    pub slot: &'static str,
    /// UDP address.
    pub listen: SocketAddr,
    /// Where requests go.
    pub upstream: UpstreamSettings,
}

/// How the gateway is reached.
#[derive(Debug, Clone)]
pub struct UpstreamSettings {
    /// `unix:/path`, a path, `host:port`, `http://host:port` or `https://host:port`.
    pub address: String,
    /// PEM file of the CA of an `https` gateway; none: the authorities that this machine trusts.
    pub ca_file: Option<PathBuf>,
    /// Bearer token that the gateway asks for.
    pub token: Option<String>,
}

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// From a client's first packet to its hello.
    pub handshake: Duration,
    /// From a request's first byte to its last, and for an answer to be taken.
    pub transfer: Duration,
    /// For a request that names no deadline.
    pub request: Duration,
    /// For what is in flight when the edge is told to stop.
    pub drain: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(5),
            transfer: Duration::from_secs(10),
            request: Duration::from_secs(30),
            drain: Duration::from_secs(30),
        }
    }
}

/// Accepted bearer tokens.
#[derive(Clone)]
pub struct Tokens(Vec<String>);

impl Tokens {
    /// Reads a file with one token a line. A file without any is refused, since it would lock everybody out.
    pub fn load(path: &Path) -> Result<Self, EdgeError> {
        let problem = |problem: String| EdgeError::File { path: path.into(), problem };
        let text = std::fs::read_to_string(path).map_err(|error| problem(error.to_string()))?;
        let tokens: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
        if tokens.is_empty() { Err(problem("no token in it".into())) } else { Ok(Self(tokens)) }
    }

    /// Whether `token` is one of them, in a time that depends on no token's content.
    pub fn accept(&self, token: &str) -> bool {
        self.0.iter().fold(0, |found, known| found | known.as_bytes().ct_eq(token.as_bytes()).unwrap_u8()) == 1
    }
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tokens", self.0.len())
    }
}
