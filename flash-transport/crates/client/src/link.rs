//! One connection.

use std::collections::{HashMap, VecDeque};
use std::future::pending;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use openpi_flash_congestion::{BurstConfig, rate};
use openpi_flash_quic::messages::{Delivery, Messages, Redundancy};
use openpi_flash_quic::stream::{ReadFault, read_frame, write, write_frame};
use openpi_flash_quic::{ExactRuntime, MAX_PACKET, accept_large_packets, code, socket};
use openpi_flash_wire::{CloseCode, Code, Frame, Hello, Refusal, Request, Response, WireError, encode};
use quinn::{
    ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig, ReadError, RecvStream, SendStream, WriteError,
};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use crate::{Error, Options};

/// A connection with a socket of its own, so that a new one begins from a new port.
pub(crate) struct Link {
    pub connection: Connection,
    endpoint: Endpoint,
    server: Arc<str>,
    /// Whether the handshake is over; until then what is sent could be replayed by somebody on the way.
    confirmed: watch::Receiver<bool>,
    messages: Messages,
    answers: Answers,
    /// Whether it is known what the path carries.
    explored: watch::Receiver<bool>,
    /// Whether the server takes no more here.
    leaving: AtomicBool,
}

/// What a connection has found its path to be like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Path {
    /// Bytes per second; none with a congestion control that does not tell.
    pub rate: Option<f64>,
    redundancy: Redundancy,
}

/// A request larger than this is not sent before it is known what the path carries.
const LARGE: usize = 64 << 10;

/// Longest that it waits for that.
const EXPLORATION_TIMEOUT: Duration = Duration::from_millis(500);

/// Answers that may come as messages, by their requests' streams.
type Answers = Arc<Mutex<HashMap<u32, oneshot::Sender<Bytes>>>>;

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
    /// once, before anything came back. `path` is what an earlier one has found.
    pub async fn open(
        options: &Options,
        mut config: ClientConfig,
        address: SocketAddr,
        server: Arc<str>,
        early: bool,
        path: Option<Path>,
    ) -> Result<Self, Error> {
        let mut tuning = options.tuning.clone();
        if let Some(rate) = path.and_then(|path| path.rate) {
            let known = BurstConfig { initial_rate: rate, max_initial_window: u64::MAX, ..BurstConfig::default() };
            tuning.congestion = Arc::new(known);
        }
        if address.ip().is_loopback() {
            tuning.max_packet = MAX_PACKET;
        }
        config.transport_config(Arc::new(tuning.transport()));
        let hello = Hello { token: options.token.clone() };
        let server_name = options.server_name.as_deref().unwrap_or(&options.host);
        let invalid = |reason: String| Error::Unavailable { server: server.to_string(), reason };
        let socket = bind(address).map_err(|error| invalid(error.to_string()))?;
        let mut endpoint = EndpointConfig::default();
        accept_large_packets(&mut endpoint);
        let endpoint = Endpoint::new(endpoint, None, socket, Arc::new(ExactRuntime))
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
                    if accepted.await {
                        confirm.send_replace(true);
                    } else {
                        // The server takes no early data, after a restart for example. What is queued of it could mix
                        // with what is sent again, so that a new connection is begun.
                        again.close(code(CloseCode::Done), b"no early data");
                    }
                });
                connection
            }
        };
        let redundancy = path.map(|path| path.redundancy).unwrap_or_default();
        let messages = Messages::new(connection.clone(), options.max_answer_bytes, redundancy);
        let answers = Answers::default();
        tokio::spawn({
            let (messages, answers) = (messages.clone(), Arc::clone(&answers));
            async move { messages.run(VecDeque::new(), |_| true, |id, answer| take(&answers, id, answer)).await }
        });
        let (explore, explored) = watch::channel(path.is_some());
        if path.is_none() {
            let (messages, connection) = (messages.clone(), connection.clone());
            tokio::spawn(async move {
                tokio::select! {
                    _ = timeout(EXPLORATION_TIMEOUT, messages.probe()) => {}
                    _ = connection.closed() => {}
                }
                explore.send_replace(true);
            });
        }
        let leaving = AtomicBool::new(false);
        Ok(Self { connection, endpoint, server, confirmed, messages, answers, explored, leaving })
    }

    /// Resolves when it is known what the path carries, or the time for that is over.
    pub async fn explored(&self) {
        let _ = self.explored.clone().wait_for(|explored| *explored).await;
    }

    /// Why the connection has ended, where another would end in the same way.
    pub fn refused(&self) -> Option<Error> {
        let reason = self.connection.close_reason()?;
        Some(Error::from_connection(&self.server, &reason)).filter(|error| !error.is_passing())
    }

    /// What the connection has found its path to be like; nothing before that is known.
    pub fn path(&self) -> Option<Path> {
        let path = || Path { rate: rate(self.connection.congestion_state()), redundancy: self.messages.redundancy() };
        self.explored.borrow().then(path)
    }

    /// Whether the server takes requests here.
    pub fn is_usable(&self) -> bool {
        self.connection.close_reason().is_none() && !self.leaving.load(Ordering::Relaxed)
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
        if body.len() > LARGE {
            self.explored().await;
        }
        let (send, receive) = self.connection.open_bi().await.map_err(|error| self.lost(&error))?;
        let id = send.id().index() as u32;
        let (answer, answered) = oneshot::channel();
        lock(&self.answers).insert(id, answer);
        let mut exchange = Exchange { link: self, id, send, receive, end: CloseCode::Cancelled };
        let Exchange { send, receive, end, .. } = &mut exchange;
        let head = encode(request).map_err(|error| Fault::Final(Error::Invalid(error.to_string())))?;
        let sent = async {
            let mut rest = [head.clone(), body];
            if self.messages.worthwhile() {
                let message = rest.concat().into();
                self.wrote(write(send, &mut [head]).await)?;
                if self.messages.send(id, message).await == Delivery::Complete {
                    return Ok(());
                }
                rest[0].clear();
            }
            self.wrote(write(send, &mut rest).await)?;
            let _ = send.finish(); // it fails for a stream that is reset, which the answer will tell
            Ok(())
        };
        let failed = async {
            match sent.await {
                Ok(()) => pending().await,
                Err(fault) => fault,
            }
        };
        let answer = tokio::select! {
            biased;
            Ok(answer) = answered => Frame::from_bytes(&answer, max_bytes).map_err(|error| unreadable(&error)),
            frame = read_frame::<Response>(receive, max_bytes) => frame.map_err(|fault| self.unread(fault)),
            fault = failed => Err(fault),
        };
        if answer.is_ok() {
            *end = CloseCode::Done;
        }
        answer
    }

    /// Why a part of a request was not written, where that matters.
    fn wrote(&self, written: Result<(), WriteError>) -> Result<(), Fault> {
        match written {
            Err(WriteError::Stopped(code)) if known(code) == Some(CloseCode::Reconnect) => Err(self.untouched()),
            Ok(()) | Err(WriteError::Stopped(_)) => Ok(()), // it was answered before its end
            Err(WriteError::ZeroRttRejected) => Err(self.untouched()),
            Err(WriteError::ConnectionLost(error)) => Err(self.lost(&error)),
            Err(error @ WriteError::ClosedStream) => Err(self.broken(&error.to_string())),
        }
    }

    /// Why an answer was not read.
    fn unread(&self, fault: ReadFault) -> Fault {
        match fault {
            ReadFault::Stream(ReadError::Reset(code)) if known(code) == Some(CloseCode::Reconnect) => self.untouched(),
            ReadFault::Stream(ReadError::Reset(code)) => {
                self.broken(&format!("the server gave the answer up (code {code})"))
            }
            ReadFault::Stream(ReadError::ZeroRttRejected) => self.untouched(),
            ReadFault::Stream(ReadError::ConnectionLost(error)) => self.lost(&error),
            ReadFault::Wire(error) => unreadable(&error),
            fault @ ReadFault::Stream(_) => self.broken(&format!("the server's answer: {fault}")),
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
        if !self.is_confirmed() && *error == ConnectionError::LocallyClosed {
            return Fault::Untouched; // no early data was taken
        }
        let error = Error::from_connection(&self.server, error);
        if error.is_passing() { Fault::Lost(error) } else { Fault::Final(error) }
    }

    fn broken(&self, reason: &str) -> Fault {
        Fault::Lost(Error::Unavailable { server: self.server.to_string(), reason: reason.to_owned() })
    }

    /// No request is taken on this connection any more; what was taken is still answered.
    fn untouched(&self) -> Fault {
        self.leaving.store(true, Ordering::Relaxed);
        Fault::Untouched
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close(); // the task that takes in messages would keep it
    }
}

/// A request on its way; dropped before the answer is there, it cancels the request.
struct Exchange<'a> {
    link: &'a Link,
    id: u32,
    send: SendStream,
    receive: RecvStream,
    /// Why it ends.
    end: CloseCode,
}

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        lock(&self.link.answers).remove(&self.id);
        self.link.messages.forget(self.id);
        // Without effect on a stream that is finished and acknowledged, or read to its end.
        let _ = self.receive.stop(code(self.end));
        let _ = self.send.reset(code(self.end));
    }
}

/// The server speaks another language, which it would do again.
fn unreadable(error: &WireError) -> Fault {
    Fault::Final(Error::Refused(Refusal::new(Code::Internal, format!("the server's answer: {error}"))))
}

fn take(answers: &Answers, id: u32, answer: Bytes) {
    if let Some(waiting) = lock(answers).remove(&id) {
        let _ = waiting.send(answer);
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
