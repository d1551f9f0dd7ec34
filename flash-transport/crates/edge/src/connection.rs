//! One client: its hello, then its requests, each in a task of its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::Shared;
use openpi_flash_quic::code;
use openpi_flash_quic::messages::{Messages, Redundancy};
use openpi_flash_quic::stream::read_frame;
use openpi_flash_traces::Traces;
use openpi_flash_wire::{CloseCode, Hello};
use quinn::{Connection, RecvStream, SendStream, ZeroRttAccepted};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::limits::{Budget, Place};
use crate::metrics::{Metrics, SlotLabels};
use crate::request::{Arrival, answer};
use crate::stranger::{EarlyDatagrams, widen};
use crate::upstream::Upstream;
use crate::{Limits, Timeouts, Tokens};

/// Messages that have arrived and not been looked at yet.
const MESSAGE_QUEUE: usize = 256;

/// What the connections of one port share.
pub(crate) struct Context {
    pub slot: &'static str,
    pub upstream: Upstream,
    pub tokens: Option<Tokens>,
    pub limits: Limits,
    /// Bytes that a client which has said hello may have sent without their being read.
    pub connection_window: u32,
    pub timeouts: Timeouts,
    pub metrics: Arc<Metrics>,
    pub traces: Traces,
    pub requests: Arc<Budget>,
    pub bytes: Arc<Budget>,
    pub draining: watch::Receiver<bool>,
}

/// One client.
pub(crate) struct Client {
    pub context: Arc<Context>,
    /// Of requests that name none.
    pub session: String,
    /// Whether there was such a request.
    pub uses_session: AtomicBool,
    pub bytes: Arc<Budget>,
    /// Whether the peer has finished its handshake; before, what it says may be a replay.
    pub confirmed: Shared<ZeroRttAccepted>,
    pub messages: Messages,
}

/// Serves a connection until it ends, or until the edge drains and what is in flight is answered.
pub(crate) async fn serve(context: Arc<Context>, connection: Connection, accepted: ZeroRttAccepted, mut place: Place) {
    let mut draining = context.draining.clone();
    let mut early = EarlyDatagrams::default();
    let greeted = tokio::select! {
        biased; // a datagram that comes with the hello needs no keeping
        greeted = greet(&context, &connection) => greeted,
        () = early.gather(&connection) => Err((CloseCode::Done, "it left before its hello".into())),
        _ = draining.wait_for(|draining| *draining) => Err((CloseCode::Reconnect, "the server is stopping".into())),
    };
    let confirmed = accepted.shared();
    if let Err((reason, message)) = greeted {
        // Told during the handshake, as one that resumes would be, a client does not learn the reason.
        let _ = timeout(context.timeouts.handshake, confirmed).await;
        tracing::info!(slot = context.slot, peer = %connection.remote_address(), "client refused: {message}");
        connection.close(code(reason), message.as_bytes());
        return;
    }
    place.established();
    widen(&connection, context.connection_window, context.limits.streams);
    let labels = SlotLabels { slot: context.slot };
    context.metrics.connections.get_or_create(&labels).inc();
    let client = Arc::new(Client {
        session: format!("quic-{:016x}", fastrand::u64(..)),
        uses_session: AtomicBool::new(false),
        bytes: Budget::within(&context.bytes, context.limits.connection_bytes),
        confirmed,
        messages: Messages::new(connection.clone(), context.limits.body_bytes, Redundancy::default()),
        context: Arc::clone(&context),
    });
    answer_requests(&client, &connection, early).await;
    context.metrics.connections.get_or_create(&labels).dec();
    let path = connection.stats().path;
    context.metrics.sent_packets.get_or_create(&labels).inc_by(path.sent_packets);
    context.metrics.lost_packets.get_or_create(&labels).inc_by(path.lost_packets);
    drop(place);
    if client.uses_session.load(Ordering::Relaxed) {
        context.upstream.forget(&client.session).await;
    }
}

/// Waits for the hello and checks its token.
async fn greet(context: &Context, connection: &Connection) -> Result<(), (CloseCode, String)> {
    let hello = async {
        let mut stream = connection.accept_uni().await.map_err(|error| (CloseCode::Done, error.to_string()))?;
        let hello = read_frame::<Hello>(&mut stream, 0).await;
        hello.map_err(|fault| (CloseCode::Protocol, format!("hello: {fault}")))
    };
    let hello = timeout(context.timeouts.handshake, hello)
        .await
        .map_err(|_| (CloseCode::Limit, "no hello within the time for a handshake".to_owned()))??;
    match &context.tokens {
        Some(_) if hello.header.token.is_empty() => {
            Err((CloseCode::Unauthenticated, "this server asks for a token".into()))
        }
        Some(tokens) if !tokens.accept(&hello.header.token) => {
            Err((CloseCode::Unauthenticated, "the token is not one that this server accepts".into()))
        }
        _ => Ok(()),
    }
}

/// Answers what comes, until the connection ends; what is not answered then ends with it, and so does the gateway's work.
async fn answer_requests(client: &Arc<Client>, connection: &Connection, early: EarlyDatagrams) {
    let mut draining = client.context.draining.clone();
    let mut held = client.bytes.hold();
    let (arrived, mut messages) = mpsc::channel(MESSAGE_QUEUE);
    let taking_messages = client.messages.run(
        early.into_inner(),
        move |bytes| held.set(bytes),
        |id, message| {
            if arrived.try_send((id, message)).is_err() {
                connection.close(code(CloseCode::Limit), b"more messages than streams");
            }
        },
    );
    tokio::pin!(taking_messages);
    let mut requests = Requests { client, refusing: false, open: HashMap::new(), tasks: JoinSet::new() };
    loop {
        tokio::select! {
            () = &mut taking_messages => return,
            stream = connection.accept_bi() => match stream {
                Ok((send, receive)) => requests.on_stream(send, receive),
                Err(_) => return,
            },
            Some((id, message)) = messages.recv() => requests.on_message(id, message),
            Some(answered) = requests.tasks.join_next() => requests.on_answered(answered.ok()),
            _ = draining.wait_for(|draining| *draining), if !requests.refusing => requests.refusing = true,
        }
        if requests.open.len() > 2 * client.context.limits.streams as usize {
            connection.close(code(CloseCode::Limit), b"more requests than streams");
            return;
        }
        if requests.refusing && requests.tasks.is_empty() {
            connection.close(code(CloseCode::Reconnect), b"the server is stopping");
            return;
        }
    }
}

/// The requests of a connection. One begins with its stream or with its message of datagrams, whichever comes first.
struct Requests<'a> {
    client: &'a Arc<Client>,
    refusing: bool,
    /// By the index of the stream, until the request is answered and its stream has come.
    open: HashMap<u32, Open>,
    tasks: JoinSet<u32>,
}

/// What has not come yet of a request, and whether it is answered all the same.
struct Open {
    stream: Option<oneshot::Sender<(SendStream, RecvStream)>>,
    message: Option<oneshot::Sender<Bytes>>,
    answered: bool,
}

impl Requests<'_> {
    fn on_stream(&mut self, mut send: SendStream, mut receive: RecvStream) {
        let id = send.id().index() as u32;
        if self.refusing && !self.open.contains_key(&id) {
            let _ = receive.stop(code(CloseCode::Reconnect));
            let _ = send.reset(code(CloseCode::Reconnect));
            return;
        }
        if receive.is_0rtt() {
            let labels = SlotLabels { slot: self.client.context.slot };
            self.client.context.metrics.early_requests.get_or_create(&labels).inc();
        }
        if let Some(slot) = self.open(id).stream.take()
            && let Err((mut send, mut receive)) = slot.send((send, receive))
        {
            let _ = receive.stop(code(CloseCode::Done)); // its message is answered already
            let _ = send.reset(code(CloseCode::Done));
        }
        self.tidy(id);
    }

    fn on_message(&mut self, id: u32, message: Bytes) {
        if self.refusing && !self.open.contains_key(&id) {
            return; // its stream tells the client
        }
        if let Some(slot) = self.open(id).message.take() {
            let _ = slot.send(message); // or else it had come over its stream
        }
    }

    fn on_answered(&mut self, id: Option<u32>) {
        if let Some((id, open)) = id.and_then(|id| Some((id, self.open.get_mut(&id)?))) {
            open.answered = true;
            self.tidy(id);
        }
    }

    fn open(&mut self, id: u32) -> &mut Open {
        self.open.entry(id).or_insert_with(|| {
            let (stream, coming_stream) = oneshot::channel();
            let (message, coming_message) = oneshot::channel();
            let client = Arc::clone(self.client);
            let arrival = Arrival::new(id, coming_stream, coming_message);
            self.tasks.spawn(async move {
                answer(&client, arrival).await;
                id
            });
            Open { stream: Some(stream), message: Some(message), answered: false }
        })
    }

    fn tidy(&mut self, id: u32) {
        if self.open.get(&id).is_some_and(|open| open.answered && open.stream.is_none()) {
            self.open.remove(&id);
        }
    }
}
