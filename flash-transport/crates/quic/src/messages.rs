//! Messages over a connection's datagrams, with error correction: what gets lost is made up for before anybody asks.
//!
//! A message is sent by one end under the id of the stream that it belongs to, and delivered whole at the other, or not
//! at all; then it has to go over its stream. Both ends drive their side with [`Messages::run`].

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use openpi_flash_fec::{
    Answer, Datagram, Event, FecError, Feedback, Limits, MAX_MESSAGE_LENGTH, Receiver, Sender, Symbol,
};
pub use openpi_flash_fec::{Redundancy, warm_up};
use openpi_flash_wire::CloseCode;
use quinn::{Connection, SendDatagramError};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};

use crate::code;
use crate::tuning::DATAGRAM_SEND_BUFFER;

/// Words of the receiver that a sender has not yet looked at. More are a peer's mischief, and dropped.
const FEEDBACK_QUEUE: usize = 8;

/// Below this what is lost is sent again sooner than all of a message could be coded.
const SHORT_ROUND_TRIP: Duration = Duration::from_millis(1);

/// Id of the message that only explores the path; no stream has it.
const PROBE: u32 = u32::MAX;

/// Bytes of that message: what quinn's pacer sends in one go on a link as it is assumed, whose spread at the other end
/// then shows the bottleneck.
const PROBE_LENGTH: usize = 32 << 10;

/// One end of a connection's messages. Cheap to clone.
#[derive(Clone)]
pub struct Messages {
    inner: Arc<Inner>,
}

struct Inner {
    connection: Connection,
    receiver: Mutex<Receiver>,
    forgotten: Notify,
    outgoing: Mutex<Outgoing>,
}

struct Outgoing {
    redundancy: Redundancy,
    /// Messages on their way.
    senders: HashMap<u32, mpsc::Sender<Feedback>>,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Delivery {
    /// The peer has it.
    Complete,
    /// It has to be sent over its stream.
    UseStream,
}

impl Messages {
    /// The messages of `connection`, of which the peer's may have `longest` bytes, with the redundancy that an earlier
    /// connection has found right.
    pub fn new(connection: Connection, longest: usize, redundancy: Redundancy) -> Self {
        let limits = Limits { message_length: MAX_MESSAGE_LENGTH.min(longest), ..Limits::default() };
        let receiver = Mutex::new(Receiver::new(limits));
        let outgoing = Mutex::new(Outgoing { redundancy, senders: HashMap::new() });
        let forgotten = Notify::new();
        Self { inner: Arc::new(Inner { connection, receiver, forgotten, outgoing }) }
    }

    /// Sends a message, and waits until the peer has it. When this future is dropped no more is sent.
    pub async fn send(&self, id: u32, message: Bytes) -> Delivery {
        let inner = &*self.inner;
        let Some(longest) = inner.connection.max_datagram_size() else { return Delivery::UseStream };
        if !self.worthwhile() {
            return Delivery::UseStream;
        }
        let redundancy = lock(&inner.outgoing).redundancy;
        let Ok(sender) = Sender::new(id, message, longest, &redundancy) else { return Delivery::UseStream };
        let (registration, feedback) = Registration::new(inner, id);
        // It fails with the connection, which the stream will tell, or when the path's packets have become smaller.
        let delivery = inner.send(sender, feedback).await.unwrap_or(Delivery::UseStream);
        drop(registration);
        delivery
    }

    /// Whether the path is one on which messages arrive sooner than on a stream.
    pub fn worthwhile(&self) -> bool {
        self.inner.connection.rtt() >= SHORT_ROUND_TRIP
    }

    /// Sends what tells of the path's rate and losses before the first large message needs to know.
    pub async fn probe(&self) {
        let _ = self.send(PROBE, vec![0; PROBE_LENGTH].into()).await;
    }

    /// How many repair symbols messages get, as it has been found right until now.
    pub fn redundancy(&self) -> Redundancy {
        lock(&self.inner.outgoing).redundancy
    }

    /// Ignores what still comes of a message of the peer.
    pub fn forget(&self, id: u32) {
        lock(&self.inner.receiver).cancel(id);
        self.inner.forgotten.notify_one();
    }

    /// Takes in the peer's datagrams, those in `early` first, until the connection ends. `hold` is told how many bytes the messages in arrival
    /// hold, and says whether they may; `deliver` is given each message that is complete.
    pub async fn run(
        &self,
        mut early: VecDeque<Bytes>,
        mut hold: impl FnMut(usize) -> bool,
        mut deliver: impl FnMut(u32, Bytes),
    ) {
        let inner = &*self.inner;
        let mut outbox = VecDeque::new();
        loop {
            let wake_at = lock(&inner.receiver).poll_timeout();
            let taken = tokio::select! {
                biased;
                sent = inner.connection.send_datagram_wait(outbox.front().cloned().unwrap_or_default()),
                    if !outbox.is_empty() => match sent {
                        Err(SendDatagramError::ConnectionLost(_)) => return,
                        _ => {
                            outbox.pop_front();
                            continue;
                        }
                    },
                datagram = async {
                    match early.pop_front() {
                        Some(datagram) => Ok(datagram),
                        None => inner.connection.read_datagram().await,
                    }
                } => match datagram {
                    Ok(datagram) => inner.take_all(datagram, &mut outbox, &mut hold, &mut deliver),
                    Err(_) => return,
                },
                () = sleep_until(wake_at.map_or_else(Instant::now, Into::into)), if wake_at.is_some() => {
                    let round_trip = inner.connection.rtt();
                    outbox.extend(lock(&inner.receiver).on_timeout(Instant::now().into(), round_trip));
                    Ok(())
                }
                () = inner.forgotten.notified() => Ok(()),
            };
            hold(lock(&inner.receiver).held());
            if let Err(error) = taken {
                inner.connection.close(code(CloseCode::Protocol), error.to_string().as_bytes());
                return;
            }
        }
    }
}

impl Inner {
    async fn send(
        &self,
        mut sender: Sender,
        mut feedback: mpsc::Receiver<Feedback>,
    ) -> Result<Delivery, SendDatagramError> {
        while let Some(datagram) = sender.next_datagram() {
            self.connection.send_datagram_wait(datagram).await?;
            // The peer may have enough before it has all, or no room.
            while let Ok(feedback) = feedback.try_recv() {
                match self.on_feedback(&mut sender, &feedback) {
                    Answer::Done => return Ok(Delivery::Complete),
                    Answer::UseStream => return Ok(Delivery::UseStream),
                    Answer::Send(_) => {} // what it lacks may be on its way
                }
            }
        }
        sender.flight_sent(self.queue_empty_at().into(), self.connection.rtt());
        loop {
            let wake_at = sender.poll_timeout().map_or_else(Instant::now, Into::into);
            let answer = tokio::select! {
                Some(feedback) = feedback.recv() => self.on_feedback(&mut sender, &feedback),
                () = sleep_until(wake_at) => sender.on_timeout(Instant::now().into(), self.connection.rtt()),
            };
            match answer {
                Answer::Done => return Ok(Delivery::Complete),
                Answer::UseStream => return Ok(Delivery::UseStream),
                Answer::Send(datagrams) => {
                    let any = !datagrams.is_empty();
                    for datagram in datagrams {
                        self.connection.send_datagram_wait(datagram).await?;
                    }
                    if any {
                        sender.flight_sent(self.queue_empty_at().into(), self.connection.rtt());
                    }
                }
            }
        }
    }

    fn on_feedback(&self, sender: &mut Sender, feedback: &Feedback) -> Answer {
        let redundancy = &mut lock(&self.outgoing).redundancy;
        sender.on_feedback(Instant::now().into(), self.connection.rtt(), feedback, redundancy)
    }

    /// When what is queued now will have left, by the connection's pace.
    fn queue_empty_at(&self) -> Instant {
        let queued = DATAGRAM_SEND_BUFFER.saturating_sub(self.connection.datagram_send_buffer_space());
        let path = self.connection.stats().path;
        Instant::now() + path.rtt.mul_f64(queued as f64 / path.cwnd.max(1) as f64)
    }

    /// Takes in a datagram and those that have arrived with it.
    fn take_all(
        &self,
        first: Bytes,
        outbox: &mut VecDeque<Bytes>,
        hold: &mut impl FnMut(usize) -> bool,
        deliver: &mut impl FnMut(u32, Bytes),
    ) -> Result<(), FecError> {
        let mut next = Some(first);
        while let Some(datagram) = next {
            match Datagram::parse(&datagram)? {
                Datagram::Symbol(symbol) => self.take_symbol(&symbol, outbox, hold, deliver)?,
                Datagram::Feedback(feedback) => {
                    let sender = lock(&self.outgoing).senders.get(&feedback.message).cloned();
                    if let Some(sender) = sender {
                        let _ = sender.try_send(feedback);
                    }
                }
            }
            next = self.connection.read_datagram().now_or_never().and_then(Result::ok);
        }
        Ok(())
    }

    fn take_symbol(
        &self,
        symbol: &Symbol,
        outbox: &mut VecDeque<Bytes>,
        hold: &mut impl FnMut(usize) -> bool,
        deliver: &mut impl FnMut(u32, Bytes),
    ) -> Result<(), FecError> {
        let mut receiver = lock(&self.receiver);
        match receiver.on_symbol(Instant::now().into(), symbol)? {
            Some(Event::Complete { message, body, feedback }) => {
                drop(receiver);
                outbox.push_back(feedback);
                if message != PROBE {
                    deliver(message, body);
                }
            }
            Some(Event::Feedback(feedback)) => outbox.push_back(feedback),
            None if !hold(receiver.held()) => outbox.push_back(receiver.abandon(symbol.message)),
            None => {}
        }
        Ok(())
    }
}

/// A message on its way, until this is dropped.
struct Registration<'a> {
    inner: &'a Inner,
    id: u32,
}

impl<'a> Registration<'a> {
    fn new(inner: &'a Inner, id: u32) -> (Self, mpsc::Receiver<Feedback>) {
        let (sender, feedback) = mpsc::channel(FEEDBACK_QUEUE);
        lock(&inner.outgoing).senders.insert(id, sender);
        (Self { inner, id }, feedback)
    }
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        lock(&self.inner.outgoing).senders.remove(&self.id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
