//! Forward error correction of one message over unreliable datagrams, without sockets and without a runtime: bytes in,
//! bytes out, time passed in.
//!
//! A message becomes source symbols, its own bytes, and Reed–Solomon repair symbols, one to a datagram. Any `k` symbols
//! of a block of `k` sources give the block back, so a lost datagram costs nothing but its share of the line. What that
//! does not cover is asked for by name, and what this does not cover goes over the stream.
//!
//! - [`Sender`]: a message's datagrams, the answers to what its receiver still needs, and when to use the stream.
//! - [`Receiver`]: a connection's open messages, completed as their symbols arrive.
//! - [`Redundancy`]: how many repair symbols to send unasked.
//! - [`Datagram`]: what came from the peer, to be handed to the one or the other.
//!
//! ```
//! # use std::time::{Duration, Instant};
//! # use openpi_flash_fec::{Datagram, Event, Limits, Receiver, Redundancy, Sender};
//! let (now, mut receiver) = (Instant::now(), Receiver::new(Limits::default()));
//! let message = bytes::Bytes::from(vec![7; 100_000]);
//! let mut sender = Sender::new(1, message.clone(), 1400, &Redundancy::default())?;
//! let mut received = None;
//! while let Some(datagram) = sender.next_datagram() {
//!     if let Datagram::Symbol(symbol) = Datagram::parse(&datagram)? {
//!         if let Some(Event::Complete { body, .. }) = receiver.on_symbol(now, &symbol)? {
//!             received = Some(body);
//!         }
//!     }
//! }
//! assert_eq!(received, Some(message));
//! # Ok::<(), openpi_flash_fec::FecError>(())
//! ```

mod code;
mod datagram;
mod layout;
mod receiver;
mod redundancy;
mod sender;

pub use code::warm_up;
pub use datagram::{Datagram, Feedback, Need, Report, Symbol, Verdict};
pub use receiver::{Event, Limits, Receiver};
pub use redundancy::Redundancy;
pub use sender::{Answer, Sender};

/// Largest message, in bytes.
pub const MAX_MESSAGE_LENGTH: usize = 16 << 20;

/// A datagram, or a message, that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FecError {
    /// The peer speaks another version, or it is another kind of datagram.
    #[error("first byte {0:#04x} is no datagram of this protocol")]
    Kind(u8),
    /// The datagram ends too early or too late.
    #[error("a datagram of {0} bytes, which does not fit its kind")]
    Length(usize),
    /// A field holds what it must not.
    #[error("{0} is out of range")]
    Range(&'static str),
    /// Another datagram of the same message said otherwise.
    #[error("datagrams of message {0} contradict one another")]
    Inconsistent(u32),
}
