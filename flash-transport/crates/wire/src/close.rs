//! Why a connection is closed, or a stream reset, as QUIC application error codes.

/// An application error code of QUIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum CloseCode {
    /// Nothing is wrong: the client is done.
    Done = 0,
    /// The server is going away, or takes no new request: connect again, at once, and ask again.
    Reconnect = 1,
    /// The token is missing or wrong.
    Unauthenticated = 2,
    /// A limit was exceeded, of time or of number.
    Limit = 3,
    /// The peer broke the protocol.
    Protocol = 4,
    /// A request was given up by the client.
    Cancelled = 5,
}

impl CloseCode {
    /// The reason that a code stands for; none for one that this version does not know.
    pub fn from_code(code: u64) -> Option<Self> {
        [Self::Done, Self::Reconnect, Self::Unauthenticated, Self::Limit, Self::Protocol, Self::Cancelled]
            .into_iter()
            .find(|known| *known as u64 == code)
    }
}
