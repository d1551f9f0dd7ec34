//! `PolicyService` as a tonic server, whatever answers it.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Either, Shared, select};
use futures_util::stream::{self, Stream};
use openpi_flash_wire::envelope::{read_stream_request, stream_refusal, stream_response_head};
use openpi_flash_wire::{Code, Method, Refusal};
use tonic::body::Body;
use tonic::codegen::http;
use tonic::metadata::MetadataMap;
use tonic::server::{Grpc, NamedService};
use tonic::{Request, Response, Status, Streaming};
use tower::{Service, service_fn};

use crate::{INFER_STREAM, Raw, RawCodec, SERVICE, path, status};

/// Room for an envelope around the largest body.
const ENVELOPE_BYTES: usize = 1 << 16;

/// What a call has besides its body.
#[derive(Debug, Clone, Default)]
pub struct CallContext {
    /// Time left; none: no deadline.
    pub timeout: Option<Duration>,
    /// W3C trace context; empty: none.
    pub traceparent: String,
    /// W3C trace context; empty: none.
    pub tracestate: String,
}

/// Answers calls. The future is dropped when its caller gives up.
pub trait Handler: Send + Sync + 'static {
    /// Answers one call, serialized in and out.
    fn call(
        &self,
        method: Method,
        body: Bytes,
        context: CallContext,
    ) -> impl Future<Output = Result<Bytes, Refusal>> + Send;
}

/// `PolicyService` around a handler.
pub struct PolicyServer<H> {
    handler: Arc<H>,
    max_body_bytes: usize,
    stop: Stop,
}

/// Resolves when the server is told to stop.
type Stop = Shared<BoxFuture<'static, ()>>;

impl<H: Handler> PolicyServer<H> {
    /// A service that accepts requests of at most `max_body_bytes`. When `stop` resolves its streams end, each after
    /// the answer that it is at: they would otherwise hold up a server's shutdown for as long as their clients like.
    pub fn new(handler: H, max_body_bytes: usize, stop: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { handler: Arc::new(handler), max_body_bytes, stop: stop.boxed().shared() }
    }
}

impl<H> Clone for PolicyServer<H> {
    fn clone(&self) -> Self {
        let (handler, stop) = (Arc::clone(&self.handler), self.stop.clone());
        Self { handler, max_body_bytes: self.max_body_bytes, stop }
    }
}

impl<H> NamedService for PolicyServer<H> {
    const NAME: &'static str = SERVICE;
}

impl<H: Handler> Service<http::Request<Body>> for PolicyServer<H> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (handler, stop) = (Arc::clone(&self.handler), self.stop.clone());
        let mut grpc = Grpc::new(RawCodec).max_decoding_message_size(self.max_body_bytes + ENVELOPE_BYTES);
        let methods = [Method::Infer, Method::Reset, Method::GetMetadata];
        let unary = methods.into_iter().find(|method| path(*method) == request.uri().path());
        Box::pin(async move {
            Ok(match unary {
                Some(method) => {
                    let answer = service_fn(move |request: Request<Bytes>| {
                        let handler = Arc::clone(&handler);
                        async move {
                            let context = context(request.metadata());
                            let answer = handler.call(method, request.into_inner(), context).await;
                            answer.map(|body| Response::new(Raw::from(body))).map_err(|refusal| status(&refusal))
                        }
                    });
                    grpc.unary(answer, request).await
                }
                None if request.uri().path() == INFER_STREAM => {
                    let answer = service_fn(move |request: Request<Streaming<Bytes>>| {
                        let context = context(request.metadata());
                        let answers = lock_step(Arc::clone(&handler), context, request.into_inner(), stop.clone());
                        async move { Ok::<_, Status>(Response::new(answers)) }
                    });
                    grpc.streaming(answer, request).await
                }
                None => Status::unimplemented("PolicyService has no such method").into_http(),
            })
        })
    }
}

/// The answers of a stream of inferences, in order, one at a time. Where one names no trace it is in the stream's.
fn lock_step<H: Handler>(
    handler: Arc<H>,
    context: CallContext,
    requests: Streaming<Bytes>,
    stop: Stop,
) -> impl Stream<Item = Result<Raw, Status>> + Send {
    stream::unfold((handler, context, requests, stop), |(handler, context, mut requests, stop)| async move {
        let next = match select(pin!(requests.message()), stop.clone()).await {
            Either::Left((next, _)) => next,
            Either::Right(((), _)) => Ok(None),
        };
        let answer = match next {
            Ok(None) => return None,
            Ok(Some(message)) => answer_one(&*handler, &context, &message).await,
            Err(status) => Err(status),
        };
        Some((answer, (handler, context, requests, stop)))
    })
}

async fn answer_one<H: Handler>(handler: &H, stream: &CallContext, message: &Bytes) -> Result<Raw, Status> {
    let request = match read_stream_request(message) {
        Ok(request) => request,
        Err(error) => {
            let refusal = Refusal::new(Code::InvalidArgument, format!("the request: {error}"));
            return Ok(stream_refusal(0, &refusal).into());
        }
    };
    let own = (request.timeout_ms > 0).then(|| Duration::from_millis(request.timeout_ms.into()));
    let has_trace = !request.traceparent.is_empty();
    let context = CallContext {
        timeout: own.into_iter().chain(stream.timeout).min(),
        traceparent: if has_trace { request.traceparent } else { stream.traceparent.clone() },
        tracestate: if has_trace { request.tracestate } else { stream.tracestate.clone() },
    };
    Ok(match handler.call(Method::Infer, request.body, context).await {
        Ok(body) => Raw { head: stream_response_head(request.request_id, body.len()), body },
        Err(refusal) => stream_refusal(request.request_id, &refusal).into(),
    })
}

fn context(metadata: &MetadataMap) -> CallContext {
    let text = |key| metadata.get(key).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    CallContext {
        timeout: parse_timeout(&text("grpc-timeout")),
        traceparent: text("traceparent"),
        tracestate: text("tracestate"),
    }
}

/// gRPC's `grpc-timeout`: at most eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let amount = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_have_grpcs_units() {
        assert_eq!(parse_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse_timeout("2S"), Some(Duration::from_secs(2)));
        assert_eq!(parse_timeout("1H"), Some(Duration::from_secs(3600)));
        for text in ["", "m", "5", "-1S", "123456789S", "1é"] {
            assert_eq!(parse_timeout(text), None, "{text}");
        }
    }
}
