//! What both ends of the QUIC transport share: TLS, tuning, sockets, frames on streams and messages in datagrams.

pub mod messages;
mod runtime;
pub mod socket;
pub mod stream;
pub mod tls;
mod tuning;

use openpi_flash_wire::CloseCode;
pub use runtime::ExactRuntime;
pub use tuning::{Congestion, MAX_PACKET, Tuning, accept_large_packets};

/// A reason to close as QUIC's number.
pub fn code(code: CloseCode) -> quinn::VarInt {
    quinn::VarInt::from_u32(code as u32)
}
