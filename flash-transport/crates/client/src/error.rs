//! Why a call has no answer, and whether another try may have one.

use openpi_flash_quic::tls::TlsError;
use openpi_flash_wire::{CloseCode, Code, Refusal};
use quinn::{ConnectionError, TransportErrorCode};

/// Why a call has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The server answered with an error.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is no connection to the server.
    #[error("{server}: {reason}")]
    Unavailable {
        /// Host and port.
        server: String,
        /// Why not.
        reason: String,
    },
    /// The call's time ran out.
    #[error("no answer within {timeout_ms} ms")]
    DeadlineExceeded {
        /// The time that the call had.
        timeout_ms: u64,
    },
    /// The server is not trusted, or does not trust this client.
    #[error("{server}: {reason}")]
    Untrusted {
        /// Host and port.
        server: String,
        /// Why not.
        reason: String,
    },
    /// The client has been closed.
    #[error("the client is closed")]
    Closed,
    /// The options, or the call's arguments, cannot be used.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// The gRPC status that says the same.
    pub fn code(&self) -> Code {
        match self {
            Self::Refused(refusal) => refusal.code,
            Self::Unavailable { .. } => Code::Unavailable,
            Self::DeadlineExceeded { .. } => Code::DeadlineExceeded,
            Self::Untrusted { .. } => Code::Unauthenticated,
            Self::Closed => Code::Cancelled,
            Self::Invalid(_) => Code::InvalidArgument,
        }
    }

    /// Path of the offending field; empty where there is none.
    pub fn field(&self) -> &str {
        match self {
            Self::Refused(refusal) => &refusal.field,
            _ => "",
        }
    }

    /// The same as the server of a sidecar says it.
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Refused(refusal) => refusal.clone(),
            other => Refusal::new(other.code(), other.to_string()),
        }
    }

    /// What the end of a connection means.
    pub(crate) fn from_connection(server: &str, error: &ConnectionError) -> Self {
        let server = server.to_owned();
        match error {
            ConnectionError::TransportError(error) if is_crypto(error.code) => {
                Self::Untrusted { server, reason: error.reason.clone() }
            }
            ConnectionError::ConnectionClosed(close) if is_crypto(close.error_code) => {
                let reason = format!("the server ended the handshake: {close}");
                Self::Untrusted { server, reason }
            }
            ConnectionError::ApplicationClosed(close) => {
                let reason = String::from_utf8_lossy(&close.reason).into_owned();
                match CloseCode::from_code(close.error_code.into_inner()) {
                    Some(CloseCode::Unauthenticated) => Self::Refused(Refusal::new(Code::Unauthenticated, reason)),
                    Some(CloseCode::Protocol) => Self::Refused(Refusal::new(Code::Internal, reason)),
                    _ => Self::Unavailable { server, reason },
                }
            }
            other => Self::Unavailable { server, reason: other.to_string() },
        }
    }

    /// Whether there may be a connection at the next try.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

impl From<TlsError> for Error {
    fn from(error: TlsError) -> Self {
        Self::Invalid(error.to_string())
    }
}

/// TLS alerts are QUIC's codes 0x100 to 0x1ff.
fn is_crypto(code: TransportErrorCode) -> bool {
    (0x100..0x200).contains(&u64::from(code))
}
