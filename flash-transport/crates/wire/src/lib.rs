//! The frames of the QUIC transport, without sockets and without a runtime: bytes in, frames out.
//!
//! A connection begins with a [`Hello`] on a unidirectional stream of the client. Each request then has a bidirectional
//! stream of its own: a [`Request`] frame one way, a [`Response`] frame the other, a frame being a short header and the
//! serialized protobuf message of `proto/openpi_flash/v1`. What leads to a server's gRPC stream and back is in
//! [`envelope`].
//!
//! A frame may also come as a message of datagrams with error correction, whose id is the index of the frame's stream.
//! Then the stream of a request carries the header alone, which opens it, and the body only where the datagrams fail;
//! whichever of the two is whole first counts.
//!
//! Every length is capped before anything is allocated for it, and memory grows with what has arrived, never with what
//! was announced.

mod close;
pub mod envelope;
mod frame;
mod header;
pub mod protobuf;
mod status;

pub use close::CloseCode;
pub use frame::{Decoder, Frame, MAX_BODY_LENGTH, encode};
pub use header::{Header, Hello, Method, Request, Response, limits};
pub use status::{Code, Refusal};

/// What both ends name in the TLS handshake.
pub const ALPN: &[u8] = b"openpi-flash/1";

/// First byte of every frame.
pub const VERSION: u8 = 1;

/// Bytes that are no frame of this protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The peer speaks another version.
    #[error("frame version {0}, expected {VERSION}")]
    Version(u8),
    /// A field holds what it must not.
    #[error("{field}: {problem}")]
    Field {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A field is longer than it may be.
    #[error("{field}: {length} bytes, at most {limit} are accepted")]
    TooLong {
        /// Which.
        field: &'static str,
        /// Announced length.
        length: usize,
        /// Largest length.
        limit: usize,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// Bytes follow the frame.
    #[error("bytes follow the frame")]
    Trailing,
    /// A protobuf envelope that cannot be read.
    #[error("not a valid protobuf message ({0})")]
    Protobuf(&'static str),
}
