//! The gateway as the edge sees it: a pool of long-lived streams for inferences, each with one request in flight, and
//! unary calls for the rest.

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use openpi_flash_grpc::{INFER_STREAM, Raw, RawCodec, path, refusal};
use openpi_flash_wire::envelope::{StreamRequest, read_stream_response, reset_request, stream_request_head};
use openpi_flash_wire::{Code, Method, Refusal, Request};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Status, Streaming};

use crate::{EdgeError, UpstreamSettings};

/// Room for an answer's envelope around the largest body.
const ENVELOPE_BYTES: usize = 1 << 16;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Time that a session which nobody uses any more has to be forgotten.
const FORGET_TIMEOUT: Duration = Duration::from_secs(2);

/// A gateway.
pub(crate) struct Upstream {
    channel: Channel,
    token: Option<MetadataValue<Ascii>>,
    max_message_bytes: usize,
    idle: Mutex<Vec<Stream>>,
    last_request_id: AtomicU64,
}

/// A stream without a request in flight. Dropping it ends it, so that the gateway drops the work.
struct Stream {
    requests: mpsc::Sender<Raw>,
    responses: Streaming<Bytes>,
}

impl Upstream {
    /// A gateway that is connected to when it is first needed, and again whenever that is lost.
    pub fn new(settings: &UpstreamSettings, max_body_bytes: usize) -> Result<Self, EdgeError> {
        let problem = |problem: String| EdgeError::Upstream { address: settings.address.clone(), problem };
        let uri = match &settings.address {
            path if path.starts_with('/') => format!("unix:{path}"),
            uri if uri.starts_with("unix:") || uri.contains("://") => uri.clone(),
            host_and_port => format!("http://{host_and_port}"),
        };
        let mut endpoint = Endpoint::from_str(&uri)
            .map_err(|error| problem(format!("{error}; unix:/path, host:port or https://host:port is expected")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true);
        if uri.starts_with("https:") {
            let mut tls = ClientTlsConfig::new();
            tls = match &settings.ca_file {
                Some(path) => {
                    let pem = std::fs::read(path);
                    let pem =
                        pem.map_err(|error| EdgeError::File { path: path.clone(), problem: error.to_string() })?;
                    tls.ca_certificate(Certificate::from_pem(pem))
                }
                None => tls.with_native_roots(),
            };
            endpoint = endpoint.tls_config(tls).map_err(|error| problem(error.to_string()))?;
        }
        let bearer = settings.token.as_ref().map(|token| format!("Bearer {token}").parse());
        Ok(Self {
            channel: endpoint.connect_lazy(),
            token: bearer.transpose().map_err(|_| problem("its token is not printable ASCII".into()))?,
            max_message_bytes: max_body_bytes + ENVELOPE_BYTES,
            idle: Mutex::default(),
            last_request_id: AtomicU64::new(0),
        })
    }

    /// Has the gateway answer a request that is in `session` where it names none itself. When this future is dropped
    /// the gateway drops the work.
    pub async fn call(&self, request: &Request, body: Bytes, session: &str, by: Instant) -> Result<Bytes, Refusal> {
        let answer = async {
            match request.method {
                Method::Infer => self.infer(request, body, session, by).await,
                Method::Reset | Method::GetMetadata => self.unary(request, body, by).await,
            }
        };
        match timeout_at(by, answer).await {
            Ok(answer) => answer,
            Err(_) => {
                Err(Refusal::new(Code::DeadlineExceeded, "the request's time ran out before the gateway had answered"))
            }
        }
    }

    /// Has the gateway forget a session, if it can be told now.
    pub async fn forget(&self, session: &str) {
        let by = Instant::now() + FORGET_TIMEOUT;
        let body = reset_request(session);
        let request = Request::new(Method::Reset, body.len() as u32);
        if let Err(refusal) = self.call(&request, body, session, by).await {
            tracing::debug!(session, %refusal, "a session was not forgotten");
        }
    }

    async fn infer(&self, request: &Request, body: Bytes, session: &str, by: Instant) -> Result<Bytes, Refusal> {
        let request_id = self.last_request_id.fetch_add(1, Ordering::Relaxed) + 1;
        let envelope = StreamRequest {
            request_id,
            timeout_ms: left_ms(by),
            traceparent: request.traceparent.clone(),
            tracestate: request.tracestate.clone(),
            body,
        };
        let raw = Raw { head: stream_request_head(&envelope, session), body: envelope.body };
        let pooled = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let (stream, answer) = match pooled {
            None => self.open(raw).await?,
            Some(mut stream) => match stream.exchange(raw.clone()).await {
                Ok(answer) => (stream, answer),
                // The stream had ended while it was idle, or with its gateway; a refusal would be in the answer.
                Err(status) => {
                    tracing::debug!(%status, "a pooled stream gave no answer, opening another");
                    self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
                    self.open(raw).await?
                }
            },
        };
        let (answered_id, result) = read_stream_response(&answer)
            .map_err(|error| Refusal::new(Code::Internal, format!("the gateway's answer: {error}")))?;
        if answered_id != request_id {
            // Never hand a robot another moment's actions.
            let problem = format!("the gateway answered request {answered_id} in place of {request_id}");
            return Err(Refusal::new(Code::Internal, problem));
        }
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
        result
    }

    /// Opens a stream with its first request. A gRPC server may send its headers with its first answer only.
    async fn open(&self, first: Raw) -> Result<(Stream, Bytes), Refusal> {
        let (requests, receiver) = mpsc::channel(1);
        let opened = async {
            requests.send(first).await.map_err(|_| Status::internal("the stream has no receiver"))?;
            let mut grpc = self.ready().await?;
            let outgoing = self.authorized(tonic::Request::new(ReceiverStream::new(receiver)));
            let path = PathAndQuery::from_static(INFER_STREAM);
            let responses = grpc.streaming(outgoing, path, RawCodec).await?.into_inner();
            let mut stream = Stream { requests, responses };
            let answer = stream.answer().await?;
            Ok::<_, Status>((stream, answer))
        };
        opened.await.map_err(|status| refusal(&status))
    }

    async fn unary(&self, request: &Request, body: Bytes, by: Instant) -> Result<Bytes, Refusal> {
        let mut outgoing = self.authorized(tonic::Request::new(Raw::from(body)));
        outgoing.set_timeout(by.saturating_duration_since(Instant::now()));
        for (key, value) in [("traceparent", &request.traceparent), ("tracestate", &request.tracestate)] {
            if let (false, Ok(value)) = (value.is_empty(), value.parse()) {
                outgoing.metadata_mut().insert(key, value);
            }
        }
        let answer = async {
            let path = PathAndQuery::from_static(path(request.method));
            Ok::<_, Status>(self.ready().await?.unary(outgoing, path, RawCodec).await?.into_inner())
        };
        answer.await.map_err(|status| refusal(&status))
    }

    async fn ready(&self) -> Result<Grpc<Channel>, Status> {
        let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(self.max_message_bytes);
        let unreachable = |error| Status::unavailable(format!("the gateway cannot be reached: {error}"));
        grpc.ready().await.map_err(unreachable)?;
        Ok(grpc)
    }

    fn authorized<T>(&self, mut request: tonic::Request<T>) -> tonic::Request<T> {
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.clone());
        }
        request
    }
}

impl Stream {
    async fn exchange(&mut self, request: Raw) -> Result<Bytes, Status> {
        self.requests.send(request).await.map_err(|_| Status::unavailable("the stream had ended"))?;
        self.answer().await
    }

    async fn answer(&mut self) -> Result<Bytes, Status> {
        self.responses.message().await?.ok_or_else(|| Status::unavailable("the gateway ended the stream"))
    }
}

/// Time left, in whole milliseconds and at least one, since 0 would stand for no deadline.
fn left_ms(by: Instant) -> u32 {
    let left = by.saturating_duration_since(Instant::now()).as_millis();
    u32::try_from(left).unwrap_or(u32::MAX).max(1)
}
