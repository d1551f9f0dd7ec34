//! Protobuf messages read no deeper than their top-level fields.

use bytes::BufMut;

use crate::WireError;

/// A top-level field, as far as the envelopes need it.
pub enum Field<'a> {
    /// A varint.
    Number(u64),
    /// What is length-delimited, and where in the message it starts.
    Bytes(usize, &'a [u8]),
}

/// The next top-level varint or length-delimited field, with its number, from `position`, which is moved on; none at
/// the end. Fields of fixed length are passed over; groups, which proto3 does not have, are refused.
pub fn next_field<'a>(message: &'a [u8], position: &mut usize) -> Result<Option<(u64, Field<'a>)>, WireError> {
    while *position < message.len() {
        let tag = varint(message, position)?;
        if tag >> 3 == 0 {
            return Err(WireError::Protobuf("field number 0"));
        }
        let length = match tag & 7 {
            0 => return Ok(Some((tag >> 3, Field::Number(varint(message, position)?)))),
            1 => 8,
            2 => usize::try_from(varint(message, position)?).unwrap_or(usize::MAX),
            5 => 4,
            _ => return Err(WireError::Protobuf("unknown wire type")),
        };
        let start = *position;
        let end = start.checked_add(length).filter(|end| *end <= message.len());
        *position = end.ok_or(WireError::Protobuf("truncated"))?;
        if tag & 7 == 2 {
            return Ok(Some((tag >> 3, Field::Bytes(start, &message[start..*position]))));
        }
    }
    Ok(None)
}

/// Appends a varint field, unless it is 0, which proto3 does not send.
pub fn put_number(out: &mut impl BufMut, number: u32, value: u64) {
    if value != 0 {
        put_varint(out, u64::from(number) << 3);
        put_varint(out, value);
    }
}

/// Appends a string field, unless it is empty, which proto3 does not send.
pub fn put_text(out: &mut impl BufMut, number: u32, value: &str) {
    if !value.is_empty() {
        put_length(out, number, value.len());
        out.put_slice(value.as_bytes());
    }
}

/// Appends tag and length of a length-delimited field.
pub fn put_length(out: &mut impl BufMut, number: u32, length: usize) {
    put_varint(out, u64::from(number) << 3 | 2);
    put_varint(out, length as u64);
}

fn put_varint(out: &mut impl BufMut, mut value: u64) {
    while value > 0x7f {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn varint(message: &[u8], position: &mut usize) -> Result<u64, WireError> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *message.get(*position).ok_or(WireError::Protobuf("truncated"))?;
        *position += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(WireError::Protobuf("overlong number"))
}
