//! The frames of the QUIC transport, without sockets and without a runtime: bytes in, frames out.
