//! What a client may send before its hello is accepted: a request right behind the hello has room, and a stranger makes
//! the server hold little.

use std::collections::VecDeque;

use bytes::Bytes;
use openpi_flash_quic::Tuning;
use quinn::{Connection, VarInt};

/// Bytes on streams: a hello and a request of 1 MiB.
const STREAM_BYTES: u32 = (1 << 20) + (64 << 10);

/// Streams of requests at once.
const STREAMS: u32 = 8;

/// Datagrams that overtook the hello, in bytes with what it takes to keep them: the same request with a quarter of
/// redundancy.
const DATAGRAM_BYTES: usize = 5 << 18;

/// The limits that every connection begins with.
pub(crate) fn narrowed(tuning: &Tuning, streams: u32) -> Tuning {
    let connection_window = tuning.connection_window.min(STREAM_BYTES);
    // A client that resumes a connection relies on the limits that it was told before: they are the same for all.
    Tuning { streams: (streams.min(STREAMS), 1), connection_window, ..tuning.clone() }
}

/// Gives a client whose hello is accepted its whole limits. It is told at once, while its first request is on the way.
pub(crate) fn widen(connection: &Connection, connection_window: u32, streams: u32) {
    connection.set_receive_window(VarInt::from_u32(connection_window));
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(streams));
}

/// Datagrams that came before the hello was accepted.
///
/// QUIC bounds the datagrams that wait to be read by their length, yet each holds the whole packet that it came in, or
/// several: so they are read as they come, always.
#[derive(Default)]
pub(crate) struct EarlyDatagrams {
    kept: VecDeque<Bytes>,
    bytes: usize,
}

impl EarlyDatagrams {
    /// Takes datagrams in and keeps as many as a stranger may send. Ends with the connection; nothing is lost when the
    /// future is dropped.
    pub async fn gather(&mut self, connection: &Connection) {
        while let Ok(datagram) = connection.read_datagram().await {
            let bytes = datagram.len() + size_of::<Bytes>();
            if self.bytes + bytes <= DATAGRAM_BYTES {
                self.bytes += bytes;
                self.kept.push_back(Bytes::copy_from_slice(&datagram)); // which holds no packet
            }
        }
    }

    /// In the order of arrival.
    pub fn into_inner(self) -> VecDeque<Bytes> {
        self.kept
    }
}
