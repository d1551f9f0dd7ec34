//! `InferStreamRequest` and `InferStreamResponse` of `inference.proto` around an inference that stays serialized.
//!
//! Serialized messages of one type that follow each other are, merged, one message, in which the later value of a field
//! counts: so a default goes before a body without reading it.

use bytes::{Bytes, BytesMut};

use crate::protobuf::{Field, next_field, put_length, put_number, put_text};
use crate::{Code, Refusal, WireError};

const INFER_SESSION_ID: u32 = 1;
const RESET_SESSION_ID: u32 = 1;

const REQUEST_ID: u64 = 1;
const TIMEOUT_MS: u64 = 2;
const TRACEPARENT: u64 = 3;
const TRACESTATE: u64 = 4;
const REQUEST: u64 = 5;

const RESPONSE: u64 = 2;
const ERROR: u64 = 3;

const ERROR_CODE: u64 = 1;
const ERROR_MESSAGE: u64 = 2;
const ERROR_FIELD: u64 = 3;

/// An `InferStreamRequest` whose inference is still serialized.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StreamRequest {
    /// Returned with the answer.
    pub request_id: u64,
    /// Time left in milliseconds; 0: no deadline.
    pub timeout_ms: u32,
    /// W3C trace context; empty: none.
    pub traceparent: String,
    /// W3C trace context; empty: none.
    pub tracestate: String,
    /// The serialized `InferRequest`.
    pub body: Bytes,
}

/// What goes before a serialized `InferRequest` so that it is in `session` where it names none itself.
pub fn session_prefix(session: &str) -> Bytes {
    let mut out = BytesMut::new();
    put_text(&mut out, INFER_SESSION_ID, session);
    out.freeze()
}

/// A serialized `ResetRequest`.
pub fn reset_request(session: &str) -> Bytes {
    let mut out = BytesMut::new();
    put_text(&mut out, RESET_SESSION_ID, session);
    out.freeze()
}

/// What, before the request's `body`, makes it an `InferStreamRequest` whose inference is in `session` where it names
/// none itself.
pub fn stream_request_head(request: &StreamRequest, session: &str) -> Bytes {
    let session = session_prefix(session);
    let mut out = BytesMut::with_capacity(256 + session.len());
    put_number(&mut out, REQUEST_ID as u32, request.request_id);
    put_number(&mut out, TIMEOUT_MS as u32, u64::from(request.timeout_ms));
    put_text(&mut out, TRACEPARENT as u32, &request.traceparent);
    put_text(&mut out, TRACESTATE as u32, &request.tracestate);
    put_length(&mut out, REQUEST as u32, session.len() + request.body.len());
    out.extend_from_slice(&session);
    out.freeze()
}

/// Reads an `InferStreamRequest` without copying the inference, unless it comes in several pieces.
pub fn read_stream_request(message: &Bytes) -> Result<StreamRequest, WireError> {
    let mut request = StreamRequest::default();
    let mut position = 0;
    while let Some((number, field)) = next_field(message, &mut position)? {
        match (number, field) {
            (REQUEST_ID, Field::Number(value)) => request.request_id = value,
            (TIMEOUT_MS, Field::Number(value)) => request.timeout_ms = value as u32,
            (TRACEPARENT, Field::Bytes(_, text)) => request.traceparent = utf8("traceparent", text)?,
            (TRACESTATE, Field::Bytes(_, text)) => request.tracestate = utf8("tracestate", text)?,
            (REQUEST, Field::Bytes(start, piece)) if request.body.is_empty() => {
                request.body = message.slice(start..start + piece.len());
            }
            (REQUEST, Field::Bytes(_, piece)) => request.body = [&request.body, piece].concat().into(),
            _ => {}
        }
    }
    Ok(request)
}

/// What, before a serialized `InferResponse` of `length` bytes, makes it an `InferStreamResponse`.
pub fn stream_response_head(request_id: u64, length: usize) -> Bytes {
    let mut out = BytesMut::with_capacity(32);
    put_number(&mut out, REQUEST_ID as u32, request_id);
    put_length(&mut out, RESPONSE as u32, length);
    out.freeze()
}

/// An `InferStreamResponse` that holds an error.
pub fn stream_refusal(request_id: u64, refusal: &Refusal) -> Bytes {
    let mut error = BytesMut::new();
    put_number(&mut error, ERROR_CODE as u32, refusal.code as u64);
    put_text(&mut error, ERROR_MESSAGE as u32, &refusal.message);
    put_text(&mut error, ERROR_FIELD as u32, &refusal.field);
    let mut out = BytesMut::with_capacity(error.len() + 32);
    put_number(&mut out, REQUEST_ID as u32, request_id);
    put_length(&mut out, ERROR as u32, error.len());
    out.extend_from_slice(&error);
    out.freeze()
}

/// Reads an `InferStreamResponse`: its request's id, and the serialized `InferResponse` or why there is none.
pub fn read_stream_response(message: &Bytes) -> Result<(u64, Result<Bytes, Refusal>), WireError> {
    let (mut request_id, mut result, mut position) = (0, None, 0);
    while let Some((number, field)) = next_field(message, &mut position)? {
        let answer = match (number, field) {
            (REQUEST_ID, Field::Number(value)) => {
                request_id = value;
                continue;
            }
            (RESPONSE, Field::Bytes(start, body)) => Ok(message.slice(start..start + body.len())),
            (ERROR, Field::Bytes(_, error)) => Err(read_error(error)?),
            _ => continue,
        };
        if result.replace(answer).is_some() {
            return Err(WireError::Protobuf("more than one result"));
        }
    }
    Ok((request_id, result.ok_or(WireError::Protobuf("no result"))?))
}

fn read_error(message: &[u8]) -> Result<Refusal, WireError> {
    let mut refusal = Refusal::new(Code::Unknown, "");
    let mut position = 0;
    while let Some((number, field)) = next_field(message, &mut position)? {
        match (number, field) {
            (ERROR_CODE, Field::Number(value)) => {
                refusal.code = Code::from_number(u32::try_from(value).unwrap_or_default());
            }
            (ERROR_MESSAGE, Field::Bytes(_, text)) => refusal.message = String::from_utf8_lossy(text).into_owned(),
            (ERROR_FIELD, Field::Bytes(_, text)) => refusal.field = String::from_utf8_lossy(text).into_owned(),
            _ => {}
        }
    }
    Ok(refusal)
}

fn utf8(field: &'static str, bytes: &[u8]) -> Result<String, WireError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| WireError::Field { field, problem: "not UTF-8" })
}
