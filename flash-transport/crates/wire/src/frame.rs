//! One frame of a stream, decoded as its bytes arrive.

use std::cmp::Ordering;

use bytes::{Bytes, BytesMut};

use crate::{Header, WireError};

/// Largest body that any configuration may accept.
pub const MAX_BODY_LENGTH: usize = 64 << 20;

/// Most that is reserved on a peer's word; a longer body's buffer grows as its bytes arrive.
const FIRST_RESERVATION: usize = 1 << 20;

/// A header and the bytes that it announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame<H> {
    /// The header.
    pub header: H,
    /// Exactly as many bytes as the header said.
    pub body: Bytes,
}

/// Writes a header, to be followed by the body. It must say the body's length.
pub fn encode<H: Header>(header: &H) -> Result<Bytes, WireError> {
    let mut out = BytesMut::with_capacity(256);
    header.write(&mut out)?;
    Ok(out.freeze())
}

impl<H: Header> Frame<H> {
    /// Reads a frame that is whole. The body is not copied.
    pub fn from_bytes(bytes: &Bytes, max_body_length: usize) -> Result<Self, WireError> {
        let fixed = bytes.get(..H::FIXED).ok_or(WireError::Truncated)?;
        let header_length = H::length(fixed)?;
        let header = H::parse(bytes.get(..header_length).ok_or(WireError::Truncated)?)?;
        check_body(&header, max_body_length)?;
        let body = bytes.slice(header_length..);
        match body.len().cmp(&header.body_length()) {
            Ordering::Less => Err(WireError::Truncated),
            Ordering::Equal => Ok(Self { header, body }),
            Ordering::Greater => Err(WireError::Trailing),
        }
    }
}

/// Reads the one frame of a stream from pieces of any size.
#[derive(Debug)]
pub struct Decoder<H> {
    max_body_length: usize,
    buffer: BytesMut,
    header_length: usize,
    header: Option<H>,
}

impl<H: Header> Decoder<H> {
    /// A decoder that refuses longer bodies than `max_body_length` as soon as they are announced.
    pub fn new(max_body_length: usize) -> Self {
        Self {
            max_body_length: max_body_length.min(MAX_BODY_LENGTH),
            buffer: BytesMut::new(),
            header_length: 0,
            header: None,
        }
    }

    /// Takes the next bytes of the stream.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), WireError> {
        while self.header.is_none() {
            let wanted = if self.header_length == 0 { H::FIXED } else { self.header_length };
            let taken = bytes.len().min(wanted - self.buffer.len());
            self.buffer.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.buffer.len() < wanted {
                return Ok(());
            }
            if self.header_length == 0 {
                self.header_length = H::length(&self.buffer)?;
                continue;
            }
            let header = H::parse(&self.buffer)?;
            check_body(&header, self.max_body_length)?;
            self.buffer = BytesMut::with_capacity(header.body_length().min(FIRST_RESERVATION));
            self.header = Some(header);
        }
        if bytes.len() > self.missing() {
            return Err(WireError::Trailing);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The header, once it is complete.
    pub fn header(&self) -> Option<&H> {
        self.header.as_ref()
    }

    /// Bytes of the body that have not arrived; 0 before the header is complete.
    pub fn missing(&self) -> usize {
        self.header.as_ref().map_or(0, |header| header.body_length() - self.buffer.len())
    }

    /// The frame, at the end of the stream.
    pub fn finish(self) -> Result<Frame<H>, WireError> {
        match (self.missing(), self.header) {
            (0, Some(header)) => Ok(Frame { header, body: self.buffer.freeze() }),
            _ => Err(WireError::Truncated),
        }
    }
}

fn check_body(header: &impl Header, limit: usize) -> Result<(), WireError> {
    let length = header.body_length();
    if length > limit { Err(WireError::TooLong { field: "body", length, limit }) } else { Ok(()) }
}
