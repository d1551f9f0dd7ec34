//! One connection.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use openpi_flash_quic::stream::{ReadFault, WriteFault, read_frame, write_frame};
use openpi_flash_quic::{code, socket};
use openpi_flash_wire::{CloseCode, Frame, Hello, Method, Request, Response};
use quinn::{
    ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig, ReadError, RecvStream, SendStream,
    TokioRuntime, WriteError,
};
use tokio::sync::watch;

use crate::Error;

/// A connection with a socket of its own, so that a new one begins from a new port.
pub(crate) struct Link {
    pub connection: Connection,
    endpoint: Endpoint,
    server: Arc<str>,
    /// Whether the handshake is over; until then what is sent could be replayed by somebody on the way.
    confirmed: watch::Receiver<bool>,
}

/// Why a request on a link has no answer.
pub(crate) enum Fault {
    /// The server did not look at the request.
    Untouched,
    /// The connection ended while the request was on its way or being answered.
    Lost(Error),
    /// It would be no better another time.
    Final(Error),
}

impl Link {
    /// Begins a connection and says hello. Where an earlier one can be resumed and `early` is set, it is usable at
    /// once, before anything came back.
    pub async fn open(
        config: ClientConfig,
        address: SocketAddr,
        server_name: &str,
        server: Arc<str>,
        hello: Hello,
        early: bool,
    ) -> Result<Self, Error> {
        let invalid = |reason: String| Error::Unavailable { server: server.to_string(), reason };
        let socket = bind(address).map_err(|error| invalid(error.to_string()))?;
        let endpoint = Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime))
            .map_err(|error| invalid(error.to_string()))?;
        let connecting = endpoint
            .connect_with(config, address, server_name)
            .map_err(|error| Error::Invalid(format!("{server}: {error}")))?;
        let lost = |error: ConnectionError| Error::from_connection(&server, &error);
        let (confirm, confirmed) = watch::channel(false);
        let connection = match if early { connecting.into_0rtt() } else { Err(connecting) } {
            Err(connecting) => {
                let connection = connecting.await.map_err(lost)?;
                greet(&connection, &hello).await.map_err(lost)?;
                confirm.send_replace(true);
                connection
            }
            Ok((connection, accepted)) => {
                greet(&connection, &hello).await.map_err(lost)?;
                let again = connection.clone();
                tokio::spawn(async move {
                    // The server takes no early data, after a restart for example: all of it has to be sent again.
                    if !accepted.await && greet(&again, &hello).await.is_err() {
                        return;
                    }
                    confirm.send_replace(true);
                });
                connection
            }
        };
        Ok(Self { connection, endpoint, server, confirmed })
    }

    /// Resolves when the handshake is over, or the connection.
    pub async fn confirmed(&self) {
        let _ = self.confirmed.clone().wait_for(|confirmed| *confirmed).await;
    }

    /// Whether the handshake is over.
    pub fn is_confirmed(&self) -> bool {
        *self.confirmed.borrow()
    }

    /// Sends a request and waits for its answer. When this future is dropped the server drops the work.
    pub async fn request(&self, request: &Request, body: Bytes, max_bytes: usize) -> Result<Frame<Response>, Fault> {
        if request.method == Method::Reset {
            self.confirmed().await; // an old one that is replayed would forget what the session has gathered since
        }
        let (send, receive) = self.connection.open_bi().await.map_err(|error| self.lost(&error))?;
        let mut streams = Streams { send, receive };
        match write_frame(&mut streams.send, request, body).await {
            Ok(()) => {}
            Err(WriteFault::Wire(error)) => return Err(Fault::Final(Error::Invalid(error.to_string()))),
            Err(WriteFault::Stream(WriteError::Stopped(code))) => {
                if known(code) == Some(CloseCode::Reconnect) {
                    return Err(self.untouched().await);
                } // or else the request was answered before its end
            }
            Err(WriteFault::Stream(WriteError::ZeroRttRejected)) => return Err(self.rejected().await),
            Err(WriteFault::Stream(WriteError::ConnectionLost(error))) => return Err(self.lost(&error)),
            Err(WriteFault::Stream(error @ WriteError::ClosedStream)) => return Err(self.broken(&error.to_string())),
        }
        match read_frame::<Response>(&mut streams.receive, max_bytes).await {
            Ok(frame) => Ok(frame),
            Err(ReadFault::Stream(ReadError::Reset(code))) => Err(match known(code) {
                Some(CloseCode::Reconnect) => self.untouched().await,
                _ => self.broken(&format!("the server gave the answer up (code {code})")),
            }),
            Err(ReadFault::Stream(ReadError::ZeroRttRejected)) => Err(self.rejected().await),
            Err(ReadFault::Stream(ReadError::ConnectionLost(error))) => Err(self.lost(&error)),
            Err(error) => Err(self.broken(&format!("the server's answer: {error}"))),
        }
    }

    /// Goes on from a new socket, as after a change of address.
    pub fn rebind(&self) -> std::io::Result<()> {
        self.endpoint.rebind(bind(self.connection.remote_address())?)
    }

    /// Tells the server that this is the end.
    pub fn close(&self) {
        self.connection.close(code(CloseCode::Done), b"");
    }

    /// Resolves when the server has been told.
    pub async fn closed(&self) {
        self.endpoint.wait_idle().await;
    }

    fn lost(&self, error: &ConnectionError) -> Fault {
        let error = Error::from_connection(&self.server, error);
        if error.is_passing() { Fault::Lost(error) } else { Fault::Final(error) }
    }

    fn broken(&self, reason: &str) -> Fault {
        Fault::Lost(Error::Unavailable { server: self.server.to_string(), reason: reason.to_owned() })
    }

    /// The server takes no more on this connection, which it ends once it has answered what it took.
    async fn untouched(&self) -> Fault {
        self.connection.closed().await;
        Fault::Untouched
    }

    /// The server takes no early data: once the handshake is over the same connection takes the request.
    async fn rejected(&self) -> Fault {
        self.confirmed().await;
        Fault::Untouched
    }
}

/// The two halves of a request's stream; dropped before the answer is there, it cancels the request.
struct Streams {
    send: SendStream,
    receive: RecvStream,
}

impl Drop for Streams {
    fn drop(&mut self) {
        // Without effect on a stream that is finished and acknowledged, or read to its end.
        let _ = self.receive.stop(code(CloseCode::Cancelled));
        let _ = self.send.reset(code(CloseCode::Cancelled));
    }
}

async fn greet(connection: &Connection, hello: &Hello) -> Result<(), ConnectionError> {
    let mut stream = connection.open_uni().await?;
    // Faults of the stream alone are faults of the connection, which every request will meet.
    let _ = write_frame(&mut stream, hello, Bytes::new()).await;
    Ok(())
}

fn bind(peer: SocketAddr) -> std::io::Result<std::net::UdpSocket> {
    socket::bind(match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    })
}

fn known(code: quinn::VarInt) -> Option<CloseCode> {
    CloseCode::from_code(code.into_inner())
}
