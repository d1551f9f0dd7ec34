//! The headers of the three kinds of frame. All integers are big-endian.
//!
//! ```text
//! Hello      version u8 · flags u8 · token_length u16 · token
//! Request    version u8 · method u8 · flags u16 · timeout_ms u32 · body_length u32 · session_length u8 ·
//!            traceparent_length u8 · tracestate_length u16 · session · traceparent · tracestate
//! Response   version u8 · status u8 (0: ok) · flags u16 · server_us u32 · body_length u32 · message_length u16 ·
//!            field_length u16 · message · field
//! ```
//!
//! No flag is defined yet: they are sent as 0 and others are refused, so that a later version can give them a meaning
//! that no peer passes over.

use bytes::BufMut;

use crate::{Code, Refusal, VERSION, WireError};

/// Largest lengths of the parts of a header, in bytes.
pub mod limits {
    /// A bearer token.
    pub const TOKEN: usize = 4096;
    /// A session's name.
    pub const SESSION: usize = 255;
    /// W3C `traceparent`, which has 55 bytes in its version 00.
    pub const TRACEPARENT: usize = 128;
    /// W3C `tracestate`, of which 512 must be passed on.
    pub const TRACESTATE: usize = 512;
    /// An error message.
    pub const MESSAGE: usize = 4096;
    /// The path of an offending field.
    pub const FIELD: usize = 1024;
}

/// The start of a frame.
pub trait Header: Sized {
    /// Bytes of the part that every header of this kind has.
    const FIXED: usize;

    /// Bytes of the whole header, from its first [`Self::FIXED`]. Refuses what can be refused already.
    fn length(fixed: &[u8]) -> Result<usize, WireError>;

    /// Reads a header; `bytes` has exactly the length that [`Self::length`] gave.
    fn parse(bytes: &[u8]) -> Result<Self, WireError>;

    /// Bytes that follow the header.
    fn body_length(&self) -> usize;

    /// Appends the header to `out`. Text that is longer than its limit is refused.
    fn write(&self, out: &mut impl BufMut) -> Result<(), WireError>;
}

/// What a client says first, on a unidirectional stream of its own. Nothing of a client is answered before.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Hello {
    /// Bearer token; empty: none.
    pub token: String,
}

impl std::fmt::Debug for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hello").finish_non_exhaustive() // tokens stay out of logs
    }
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Method {
    /// `PolicyService.Infer`: `InferRequest` to `InferResponse`.
    Infer = 1,
    /// `PolicyService.Reset`: `ResetRequest` to `ResetResponse`.
    Reset = 2,
    /// `PolicyService.GetMetadata`: `GetMetadataRequest` to `GetMetadataResponse`.
    GetMetadata = 3,
}

impl Method {
    /// Name within `PolicyService`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Infer => "Infer",
            Self::Reset => "Reset",
            Self::GetMetadata => "GetMetadata",
        }
    }
}

/// The header of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What is asked.
    pub method: Method,
    /// Time left when it was sent, in milliseconds; 0: no deadline.
    pub timeout_ms: u32,
    /// The session of an inference whose body names none; empty: the connection's.
    pub session: String,
    /// W3C trace context of the caller; empty: none.
    pub traceparent: String,
    /// W3C trace context of the caller; empty: none.
    pub tracestate: String,
    /// Bytes of the serialized request.
    pub body_length: u32,
}

/// The header of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// Why there is no answer, where there is none; then there is no body.
    pub refusal: Option<Refusal>,
    /// Time from the request's last byte to the answer's first at the server, in microseconds.
    pub server_us: u32,
    /// Bytes of the serialized answer.
    pub body_length: u32,
}

impl Request {
    /// A request without deadline, session and trace.
    pub fn new(method: Method, body_length: u32) -> Self {
        Self {
            method,
            timeout_ms: 0,
            session: String::new(),
            traceparent: String::new(),
            tracestate: String::new(),
            body_length,
        }
    }
}

impl Header for Hello {
    const FIXED: usize = 4;

    fn length(fixed: &[u8]) -> Result<usize, WireError> {
        check_version(fixed[0])?;
        if fixed[1] != 0 {
            return Err(UNKNOWN_FLAGS);
        }
        Ok(Self::FIXED + capped("token", u16_at(fixed, 2), limits::TOKEN)?)
    }

    fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        Ok(Self { token: text("token", &bytes[Self::FIXED..])? })
    }

    fn body_length(&self) -> usize {
        0
    }

    fn write(&self, out: &mut impl BufMut) -> Result<(), WireError> {
        capped("token", self.token.len(), limits::TOKEN)?;
        out.put_u8(VERSION);
        out.put_u8(0);
        out.put_u16(self.token.len() as u16);
        out.put_slice(self.token.as_bytes());
        Ok(())
    }
}

impl Header for Request {
    const FIXED: usize = 16;

    fn length(fixed: &[u8]) -> Result<usize, WireError> {
        check_version(fixed[0])?;
        if u16_at(fixed, 2) != 0 {
            return Err(UNKNOWN_FLAGS);
        }
        Ok(Self::FIXED
            + usize::from(fixed[12])
            + capped("traceparent", usize::from(fixed[13]), limits::TRACEPARENT)?
            + capped("tracestate", u16_at(fixed, 14), limits::TRACESTATE)?)
    }

    fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let (fixed, rest) = bytes.split_at(Self::FIXED);
        let (session, rest) = rest.split_at(usize::from(fixed[12]));
        let (traceparent, tracestate) = rest.split_at(usize::from(fixed[13]));
        Ok(Self {
            method: match fixed[1] {
                1 => Method::Infer,
                2 => Method::Reset,
                3 => Method::GetMetadata,
                _ => return Err(WireError::Field { field: "method", problem: "unknown" }),
            },
            timeout_ms: u32_at(fixed, 4),
            session: text("session", session)?,
            traceparent: visible("traceparent", traceparent)?,
            tracestate: visible("tracestate", tracestate)?,
            body_length: u32_at(fixed, 8),
        })
    }

    fn body_length(&self) -> usize {
        self.body_length as usize
    }

    fn write(&self, out: &mut impl BufMut) -> Result<(), WireError> {
        capped("session", self.session.len(), limits::SESSION)?;
        capped("traceparent", self.traceparent.len(), limits::TRACEPARENT)?;
        capped("tracestate", self.tracestate.len(), limits::TRACESTATE)?;
        out.put_u8(VERSION);
        out.put_u8(self.method as u8);
        out.put_u16(0);
        out.put_u32(self.timeout_ms);
        out.put_u32(self.body_length);
        out.put_u8(self.session.len() as u8);
        out.put_u8(self.traceparent.len() as u8);
        out.put_u16(self.tracestate.len() as u16);
        out.put_slice(self.session.as_bytes());
        out.put_slice(self.traceparent.as_bytes());
        out.put_slice(self.tracestate.as_bytes());
        Ok(())
    }
}

impl Header for Response {
    const FIXED: usize = 16;

    fn length(fixed: &[u8]) -> Result<usize, WireError> {
        check_version(fixed[0])?;
        if u16_at(fixed, 2) != 0 {
            return Err(UNKNOWN_FLAGS);
        }
        let (message, field) = (u16_at(fixed, 12), u16_at(fixed, 14));
        if fixed[1] == 0 && message + field > 0 {
            return Err(WireError::Field { field: "status", problem: "ok, yet with an error message" });
        }
        if fixed[1] != 0 && u32_at(fixed, 8) != 0 {
            return Err(WireError::Field { field: "status", problem: "an error, yet with a body" });
        }
        Ok(Self::FIXED + capped("message", message, limits::MESSAGE)? + capped("field", field, limits::FIELD)?)
    }

    fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let (fixed, rest) = bytes.split_at(Self::FIXED);
        let (message, field) = rest.split_at(u16_at(fixed, 12));
        let refusal = match fixed[1] {
            0 => None,
            code => Some(Refusal {
                code: Code::from_number(u32::from(code)),
                message: text("message", message)?,
                field: text("field", field)?,
            }),
        };
        Ok(Self { refusal, server_us: u32_at(fixed, 4), body_length: u32_at(fixed, 8) })
    }

    fn body_length(&self) -> usize {
        self.body_length as usize
    }

    fn write(&self, out: &mut impl BufMut) -> Result<(), WireError> {
        let (code, message, field) = match &self.refusal {
            None => (0, "", ""),
            // A refusal comes from elsewhere and is cut rather than lost.
            Some(refusal) => {
                (refusal.code as u8, prefix(&refusal.message, limits::MESSAGE), prefix(&refusal.field, limits::FIELD))
            }
        };
        out.put_u8(VERSION);
        out.put_u8(code);
        out.put_u16(0);
        out.put_u32(self.server_us);
        out.put_u32(self.body_length);
        out.put_u16(message.len() as u16);
        out.put_u16(field.len() as u16);
        out.put_slice(message.as_bytes());
        out.put_slice(field.as_bytes());
        Ok(())
    }
}

const UNKNOWN_FLAGS: WireError = WireError::Field { field: "flags", problem: "unknown" };

fn check_version(version: u8) -> Result<(), WireError> {
    if version == VERSION { Ok(()) } else { Err(WireError::Version(version)) }
}

fn capped(field: &'static str, length: usize, limit: usize) -> Result<usize, WireError> {
    if length > limit { Err(WireError::TooLong { field, length, limit }) } else { Ok(length) }
}

fn text(field: &'static str, bytes: &[u8]) -> Result<String, WireError> {
    let text = std::str::from_utf8(bytes).map_err(|_| WireError::Field { field, problem: "not UTF-8" })?;
    Ok(text.to_owned())
}

/// Text that may become an HTTP header.
fn visible(field: &'static str, bytes: &[u8]) -> Result<String, WireError> {
    if bytes.iter().all(|byte| matches!(byte, 0x20..=0x7e)) {
        text(field, bytes)
    } else {
        Err(WireError::Field { field, problem: "not printable ASCII" })
    }
}

/// The longest prefix of at most `limit` bytes that ends between two characters.
fn prefix(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
