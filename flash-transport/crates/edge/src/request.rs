//! One request: how it arrives, the gateway's answer, and the way back.

use std::future::pending;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use openpi_flash_quic::code;
use openpi_flash_quic::messages::Delivery;
use openpi_flash_quic::stream::{ReadFault, read_some, write};
use openpi_flash_traces::Span;
use openpi_flash_wire::{CloseCode, Code, Decoder, Frame, Method, Refusal, Request, Response, WireError, encode};
use prometheus_client::metrics::gauge::Gauge;
use quinn::{RecvStream, SendStream};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use crate::connection::{Client, Context};
use crate::limits::Held;
use crate::metrics::{MethodLabels, RequestLabels, SlotLabels, TransferLabels};

/// The two ways on which a request comes.
pub(crate) struct Arrival {
    id: u32,
    stream: Stream,
    message: oneshot::Receiver<Bytes>,
}

/// A stream that may still have to come.
struct Stream {
    coming: oneshot::Receiver<(SendStream, RecvStream)>,
    halves: Option<(SendStream, RecvStream)>,
}

/// A request that is to be answered by `by`.
struct Received {
    frame: Frame<Request>,
    by: Instant,
}

/// Why there is nothing to ask the gateway.
enum Fault {
    /// The client is told.
    Refused(Refusal),
    /// The client has given the request up.
    GivenUp,
}

impl Arrival {
    pub fn new(
        id: u32,
        stream: oneshot::Receiver<(SendStream, RecvStream)>,
        message: oneshot::Receiver<Bytes>,
    ) -> Self {
        Self { id, stream: Stream { coming: stream, halves: None }, message }
    }
}

impl Stream {
    /// Both halves, once they are there; never, where the connection ends before.
    async fn halves(&mut self) -> &mut (SendStream, RecvStream) {
        if self.halves.is_none() {
            self.halves = (&mut self.coming).await.ok();
        }
        match &mut self.halves {
            Some(halves) => halves,
            None => pending().await,
        }
    }

    /// Resolves when the client wants no answer, or no longer, or has it, which is when it says so.
    async fn stopped(&mut self) -> CloseCode {
        let stopped = self.halves().await.0.stopped();
        let told = stopped.await.ok().flatten();
        told.and_then(|told| CloseCode::from_code(told.into())).unwrap_or(CloseCode::Cancelled)
    }

    /// Ends what is not ended yet.
    fn end(&mut self, reason: CloseCode) {
        if let Some((send, receive)) = &mut self.halves {
            let _ = receive.stop(code(reason));
            let _ = send.reset(code(reason));
        }
    }
}

/// Answers one request, unless it is given up.
pub(crate) async fn answer(client: &Client, mut arrival: Arrival) {
    let context = &client.context;
    let mut held = client.bytes.hold();
    let started = Instant::now();
    let received = receive(client, &mut arrival, &mut held).await;
    client.messages.forget(arrival.id);
    let (mut method, mut took) = ("", Duration::ZERO);
    let result = match received {
        Ok(Received { mut frame, by }) => {
            method = frame.header.method.name();
            let labels = MethodLabels { slot: context.slot, method };
            let since = Instant::now();
            context.metrics.receive_seconds.get_or_create(&labels).observe((since - started).as_secs_f64());
            let span = begin_span(context, &mut frame, started);
            let result = tokio::select! {
                result = ask(client, frame, by) => result.map_err(Fault::Refused),
                _ = arrival.stream.stopped() => Err(Fault::GivenUp),
            };
            span.end(status(&result));
            took = since.elapsed();
            context.metrics.seconds.get_or_create(&labels).observe(took.as_secs_f64());
            result
        }
        Err(fault) => Err(fault),
    };
    drop(held);
    let labels = RequestLabels { slot: context.slot, method, code: status(&result) };
    context.metrics.requests.get_or_create(&labels).inc();
    match result {
        Err(Fault::GivenUp) => arrival.stream.end(CloseCode::Cancelled),
        Err(Fault::Refused(refusal)) => respond(client, &mut arrival, Some(refusal), Bytes::new(), took).await,
        Ok(body) => respond(client, &mut arrival, None, body, took).await,
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
fn status(result: &Result<Bytes, Fault>) -> &'static str {
    match result {
        Ok(_) => "OK",
        Err(Fault::Refused(refusal)) => refusal.code.name(),
        Err(Fault::GivenUp) => Code::Cancelled.name(),
    }
}

/// Waits for a request on both ways; the first that is whole counts.
async fn receive(client: &Client, arrival: &mut Arrival, held: &mut Held) -> Result<Received, Fault> {
    let context = &client.context;
    let started = Instant::now();
    let (path, received) = tokio::select! {
        biased;
        Ok(message) = &mut arrival.message => ("datagrams", read_message(context, &message, started, held)),
        received = read_stream(context, &mut arrival.stream, held) => ("stream", received),
    };
    if received.is_ok() {
        count_transfer(context, "in", path);
    }
    received
}

fn read_message(context: &Context, message: &Bytes, started: Instant, held: &mut Held) -> Result<Received, Fault> {
    hold(held, message.len())?;
    let frame = Frame::<Request>::from_bytes(message, context.limits.body_bytes).map_err(|error| refused(&error))?;
    let by = deadline(context, started, &frame.header);
    Ok(Received { frame, by })
}

/// Reads a request from its stream; what it holds grows with what has arrived.
async fn read_stream(context: &Context, stream: &mut Stream, held: &mut Held) -> Result<Received, Fault> {
    let (_, receive) = stream.halves().await;
    let started = Instant::now();
    let mut decoder = Decoder::<Request>::new(context.limits.body_bytes);
    let mut by = started + context.timeouts.request;
    let mut read_by = started + context.timeouts.transfer;
    loop {
        match timeout_at(read_by, read_some(receive, &mut decoder)).await {
            Ok(Ok(Some(bytes))) => hold(held, bytes)?,
            Ok(Ok(None)) => break,
            Ok(Err(ReadFault::Wire(error))) => return Err(refused(&error)),
            Ok(Err(ReadFault::Stream(_))) => return Err(Fault::GivenUp),
            Err(_) => {
                let message = "the request did not arrive in time";
                return Err(Fault::Refused(Refusal::new(Code::DeadlineExceeded, message)));
            }
        }
        if let Some(header) = decoder.header() {
            by = deadline(context, started, header);
            read_by = read_by.min(by);
        }
    }
    let frame = decoder.finish().map_err(|error| refused(&error))?;
    Ok(Received { frame, by })
}

fn deadline(context: &Context, started: Instant, header: &Request) -> Instant {
    match header.timeout_ms {
        0 => started + context.timeouts.request,
        ms => started + context.timeouts.request.min(Duration::from_millis(ms.into())),
    }
}

fn hold(held: &mut Held, bytes: usize) -> Result<(), Fault> {
    if held.grow(bytes) {
        return Ok(());
    }
    let message = "too many bytes of requests are in flight";
    Err(Fault::Refused(Refusal::new(Code::ResourceExhausted, message)))
}

fn refused(error: &WireError) -> Fault {
    Fault::Refused(Refusal::new(Code::InvalidArgument, error.to_string()))
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
    let named = !frame.header.session.is_empty();
    client.uses_session.fetch_or(!named, Ordering::Relaxed);
    let session = if named { &frame.header.session } else { &client.session };
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
async fn respond(client: &Client, arrival: &mut Arrival, refusal: Option<Refusal>, body: Bytes, took: Duration) {
    let context = &client.context;
    let labels = SlotLabels { slot: context.slot };
    context.metrics.sent_bytes.get_or_create(&labels).inc_by(body.len() as u64);
    let server_us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
    let header = Response { refusal, server_us, body_length: body.len() as u32 };
    let Ok(head) = encode(&header) else { return arrival.stream.end(CloseCode::Protocol) };
    let message = Bytes::from([&*head, &*body].concat());
    let sent = timeout(context.timeouts.transfer, async {
        let delivery = tokio::select! {
            delivery = client.messages.send(arrival.id, message.clone()) => delivery,
            reason = arrival.stream.stopped() => match reason {
                CloseCode::Done => Delivery::Complete,
                _ => return None,
            },
        };
        if delivery == Delivery::Complete {
            return Some("datagrams");
        }
        let (send, receive) = arrival.stream.halves().await;
        let _ = receive.stop(code(CloseCode::Done)); // of a request that was refused before its end
        write(send, &mut [message]).await.ok()?;
        send.finish().ok()?;
        let _ = send.stopped().await;
        Some("stream")
    });
    match sent.await {
        Ok(path) => {
            path.inspect(|path| count_transfer(context, "out", path));
            arrival.stream.end(CloseCode::Done);
        }
        Err(_) => arrival.stream.end(CloseCode::Limit), // a client that does not take its answer
    }
}

fn count_transfer(context: &Context, direction: &'static str, path: &'static str) {
    let labels = TransferLabels { slot: context.slot, direction, path };
    context.metrics.transfers.get_or_create(&labels).inc();
}
