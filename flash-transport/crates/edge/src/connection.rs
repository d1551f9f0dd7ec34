//! One client: its hello, then its requests, each in a task of its own.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::Shared;
use openpi_flash_quic::code;
use openpi_flash_quic::stream::{ReadFault, read_frame, read_some, write_frame};
use openpi_flash_traces::{Span, Traces};
use openpi_flash_wire::{CloseCode, Code, Decoder, Frame, Hello, Method, Refusal, Request, Response};
use prometheus_client::metrics::gauge::Gauge;
use quinn::{Connection, RecvStream, SendStream, ZeroRttAccepted};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::limits::{Budget, Held, Place};
use crate::metrics::{MethodLabels, Metrics, RequestLabels, SlotLabels};
use crate::stranger::{Datagrams, widen};
use crate::upstream::Upstream;
use crate::{Limits, Timeouts, Tokens};

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
struct Client {
    context: Arc<Context>,
    /// Of requests that name none.
    session: String,
    bytes: Arc<Budget>,
    /// Whether the peer has finished its handshake; before, what it says may be a replay.
    confirmed: Shared<ZeroRttAccepted>,
}

/// A request that cannot be answered otherwise than by ending its stream.
struct Gone;

/// Serves a connection until it ends, or until the edge drains and what is in flight is answered.
pub(crate) async fn serve(context: Arc<Context>, connection: Connection, accepted: ZeroRttAccepted, mut place: Place) {
    let mut draining = context.draining.clone();
    let mut datagrams = Datagrams::new(connection.clone());
    let greeted = tokio::select! {
        biased; // a datagram that comes with the hello needs no keeping
        greeted = greet(&context, &connection) => greeted,
        () = datagrams.gather() => Err((CloseCode::Done, "it left before its hello".into())),
        _ = draining.wait_for(|draining| *draining) => Err((CloseCode::Reconnect, "the server is stopping".into())),
    };
    if let Err((reason, message)) = greeted {
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
        bytes: Budget::within(&context.bytes, context.limits.connection_bytes),
        confirmed: accepted.shared(),
        context: Arc::clone(&context),
    });
    tokio::join!(answer_requests(&client, &connection), datagrams.discard());
    context.metrics.connections.get_or_create(&labels).dec();
    let path = connection.stats().path;
    context.metrics.sent_packets.get_or_create(&labels).inc_by(path.sent_packets);
    context.metrics.lost_packets.get_or_create(&labels).inc_by(path.lost_packets);
    context.upstream.forget(&client.session).await;
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

async fn answer_requests(client: &Arc<Client>, connection: &Connection) {
    let mut draining = client.context.draining.clone();
    let mut requests = JoinSet::new();
    let mut refusing = false;
    loop {
        tokio::select! {
            stream = connection.accept_bi() => match stream {
                Ok((mut send, mut receive)) if refusing => {
                    let _ = receive.stop(code(CloseCode::Reconnect));
                    let _ = send.reset(code(CloseCode::Reconnect));
                }
                Ok((send, receive)) => {
                    requests.spawn(answer(Arc::clone(client), send, receive));
                }
                Err(_) => return, // the requests end with their set, and with them the gateway's work
            },
            Some(_) = requests.join_next() => {}
            _ = draining.wait_for(|draining| *draining), if !refusing => refusing = true,
        }
        if refusing && requests.is_empty() {
            connection.close(code(CloseCode::Reconnect), b"the server is stopping");
            return;
        }
    }
}

/// Answers one request, unless it is given up.
async fn answer(client: Arc<Client>, mut send: SendStream, mut receive: RecvStream) {
    let context = &client.context;
    let given_up = send.stopped();
    if receive.is_0rtt() {
        context.metrics.early_requests.get_or_create(&SlotLabels { slot: context.slot }).inc();
    }
    let work = async {
        let mut held = (context.bytes.hold(), client.bytes.hold());
        let started = Instant::now();
        let (method, result, since) = match read_request(&client, &mut receive, &mut held).await {
            Ok((mut frame, by)) => {
                let since = Instant::now();
                let labels = MethodLabels { slot: context.slot, method: frame.header.method.name() };
                context.metrics.receive_seconds.get_or_create(&labels).observe((since - started).as_secs_f64());
                let span = begin_span(context, &mut frame, started);
                let method = frame.header.method.name();
                let result = ask(&client, frame, by).await;
                span.end(status(&result));
                (method, result, since)
            }
            Err(Some(refusal)) => ("", Err(refusal), Instant::now()),
            Err(None) => return Err(Gone),
        };
        drop(held);
        let took = since.elapsed();
        if !method.is_empty() {
            let labels = MethodLabels { slot: context.slot, method };
            context.metrics.seconds.get_or_create(&labels).observe(took.as_secs_f64());
        }
        Ok((method, result, took))
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        _ = given_up => Err(Gone),
    };
    let count = |method, code| {
        context.metrics.requests.get_or_create(&RequestLabels { slot: context.slot, method, code }).inc();
    };
    match outcome {
        Err(Gone) => {
            count("", Code::Cancelled.name());
            let _ = receive.stop(code(CloseCode::Cancelled));
            let _ = send.reset(code(CloseCode::Cancelled));
        }
        Ok((method, result, took)) => {
            count(method, status(&result));
            let _ = receive.stop(code(CloseCode::Done)); // of a request that was refused before its end
            respond(context, &mut send, result, took).await;
        }
    }
}

/// The span of a request whose first byte came at `started` and whose last byte came now. The gateway's is below it.
fn begin_span(context: &Context, frame: &mut Frame<Request>, started: Instant) -> Span {
    let header = &mut frame.header;
    let (method, started) = (header.method.name(), started.into_std());
    let mut span = context.traces.begin("edge", method, started, (&mut header.traceparent, &mut header.tracestate));
    span.set("slot", context.slot);
    span.set("request_bytes", i64::from(header.body_length));
    span.set("receive_ms", started.elapsed().as_secs_f64() * 1e3);
    span
}

/// Name of the gRPC status of a result.
fn status(result: &Result<Bytes, Refusal>) -> &'static str {
    result.as_ref().map_or_else(|refusal| refusal.code.name(), |_| "OK")
}

/// Reads a request; what it holds of the two budgets grows with what has arrived. The error is a refusal, or nothing
/// when the peer is gone.
async fn read_request(
    client: &Client,
    receive: &mut RecvStream,
    (total, own): &mut (Held, Held),
) -> Result<(Frame<Request>, Instant), Option<Refusal>> {
    let context = &client.context;
    let arrived = Instant::now();
    let mut decoder = Decoder::<Request>::new(context.limits.body_bytes);
    let mut by = arrived + context.timeouts.request;
    let mut read_by = arrived + context.timeouts.transfer;
    loop {
        match timeout_at(read_by, read_some(receive, &mut decoder)).await {
            Ok(Ok(Some(bytes))) => {
                if !total.grow(bytes) || !own.grow(bytes) {
                    let message = "too many bytes of requests are in flight";
                    return Err(Some(Refusal::new(Code::ResourceExhausted, message)));
                }
            }
            Ok(Ok(None)) => break,
            Ok(Err(ReadFault::Wire(error))) => {
                return Err(Some(Refusal::new(Code::InvalidArgument, error.to_string())));
            }
            Ok(Err(ReadFault::Stream(_))) => return Err(None),
            Err(_) => {
                let message = "the request did not arrive in time";
                return Err(Some(Refusal::new(Code::DeadlineExceeded, message)));
            }
        }
        if let Some(header) = decoder.header()
            && header.timeout_ms > 0
        {
            by = by.min(arrived + Duration::from_millis(header.timeout_ms.into()));
            read_by = read_by.min(by);
        }
    }
    match decoder.finish() {
        Ok(frame) => Ok((frame, by)),
        Err(error) => Err(Some(Refusal::new(Code::InvalidArgument, error.to_string()))),
    }
}

/// Has the gateway answer.
async fn ask(client: &Client, frame: Frame<Request>, by: Instant) -> Result<Bytes, Refusal> {
    let context = &client.context;
    let labels = SlotLabels { slot: context.slot };
    context.metrics.received_bytes.get_or_create(&labels).inc_by(frame.body.len() as u64);
    if frame.header.method != Method::Infer {
        client.confirmed.clone().await; // an inference may be replayed, nothing else
    }
    let mut request = context.requests.hold();
    if !request.grow(1) {
        let message = format!("{} requests are in flight already; try again later", context.limits.requests);
        return Err(Refusal::new(Code::ResourceExhausted, message));
    }
    let _in_flight = InFlight::new(context.metrics.in_flight.get_or_create(&labels).clone());
    let session = if frame.header.session.is_empty() { &client.session } else { &frame.header.session };
    let answer = context.upstream.call(&frame.header, frame.body, session, by).await;
    match answer {
        Ok(body) if body.len() > context.limits.body_bytes => {
            Err(Refusal::new(Code::Internal, format!("an answer of {} bytes is too large to be sent", body.len())))
        }
        answer => answer,
    }
}

/// A request that the gateway is asked, counted until this is dropped.
struct InFlight(Gauge);

impl InFlight {
    fn new(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Sends the answer and waits until it is there, so that a drain does not cut it off.
async fn respond(context: &Context, send: &mut SendStream, result: Result<Bytes, Refusal>, took: Duration) {
    let (refusal, body) = match result {
        Ok(body) => (None, body),
        Err(refusal) => (Some(refusal), Bytes::new()),
    };
    let labels = SlotLabels { slot: context.slot };
    context.metrics.sent_bytes.get_or_create(&labels).inc_by(body.len() as u64);
    let server_us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
    let header = Response { refusal, server_us, body_length: body.len() as u32 };
    let sent = async {
        if write_frame(send, &header, body).await.is_ok() {
            let _ = send.stopped().await;
        }
    };
    if timeout(context.timeouts.transfer, sent).await.is_err() {
        let _ = send.reset(code(CloseCode::Limit)); // a client that does not take its answer
    }
}
