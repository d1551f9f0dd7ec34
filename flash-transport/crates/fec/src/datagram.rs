//! The datagrams, written and parsed. All numbers are big-endian.
//!
//! ```text
//! symbol    0x11  block u8  index u16  message u32  message length u32  flight u16  symbol
//! done      0x12  report
//! abandoned 0x13  report
//! need      0x14  report  n u8  n × { block u8, lack u16 }  then to the end { first u16, count u16 }
//! report          message u32  seen u16  received u16  longest run u16
//! ```
//!
//! The first byte is the version, 1, and the kind. A symbol's `index` counts its block's sources, then its repairs;
//! `flight` is the number of repair symbols that every block gets unasked, which tells the receiver where the flight
//! ends.

use bytes::{Buf, BufMut};

use crate::FecError;
use crate::layout::{Layout, MAX_BLOCKS};

/// Bytes of a symbol's datagram before the symbol.
pub const SYMBOL_HEADER: usize = 14;

const SYMBOL: u8 = 0x11;
const DONE: u8 = 0x12;
const ABANDONED: u8 = 0x13;
const NEED: u8 = 0x14;
const REPORT_LENGTH: usize = 10;

/// Longest datagram of feedback: below what every QUIC path carries.
pub const MAX_FEEDBACK: usize = 1100;

/// A datagram of the peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Datagram<'a> {
    /// For the [`Receiver`](crate::Receiver).
    Symbol(Symbol<'a>),
    /// For the [`Sender`](crate::Sender) of its message.
    Feedback(Feedback),
}

/// One symbol of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// Message that it belongs to.
    pub message: u32,
    pub(crate) layout: Layout,
    pub(crate) position: usize,
    /// Symbols of the flight that was sent unasked.
    pub(crate) flight: usize,
    pub(crate) data: &'a [u8],
}

/// What a receiver says of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feedback {
    /// The message.
    pub message: u32,
    /// What arrived of the flight.
    pub report: Report,
    /// What the receiver makes of it.
    pub verdict: Verdict,
}

/// Losses among the symbols that were sent unasked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Symbols sent up to the last that arrived.
    pub seen: u16,
    /// How many of these arrived.
    pub received: u16,
    /// Most that were lost in a row.
    pub longest_run: u16,
}

/// What a receiver makes of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is complete.
    Done,
    /// The receiver no longer waits for it; it has to come over the stream.
    Abandoned,
    /// More is needed.
    Need(Need),
}

/// What a receiver lacks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Need {
    /// Incomplete blocks, and how many further symbols each wants.
    pub lacks: Vec<(u8, u16)>,
    /// Sources that did not arrive, as (first, count) in the order of sending; not all of them where they are many.
    pub missing: Vec<(u16, u16)>,
}

impl<'a> Datagram<'a> {
    /// Reads a datagram; allocates no more than its own length.
    pub fn parse(datagram: &'a [u8]) -> Result<Self, FecError> {
        let kind = *datagram.first().ok_or(FecError::Length(0))?;
        let bad_length = FecError::Length(datagram.len());
        let mut rest = &datagram[1..];
        if kind == SYMBOL {
            if datagram.len() <= SYMBOL_HEADER {
                return Err(bad_length);
            }
            let (block, index) = (rest.get_u8(), rest.get_u16());
            let (message, message_length, repairs) = (rest.get_u32(), rest.get_u32(), rest.get_u16());
            let layout = Layout::new(message_length as usize, rest.len())?;
            let position = layout.position(block.into(), index.into()).ok_or(FecError::Range("symbol index"))?;
            if usize::from(repairs) > layout.repairs {
                return Err(FecError::Range("flight"));
            }
            let flight = layout.flight(repairs.into());
            return Ok(Self::Symbol(Symbol { message, layout, position, flight, data: rest }));
        }
        if !matches!(kind, DONE | ABANDONED | NEED) {
            return Err(FecError::Kind(kind));
        }
        if rest.len() < REPORT_LENGTH {
            return Err(bad_length);
        }
        let message = rest.get_u32();
        let report = Report { seen: rest.get_u16(), received: rest.get_u16(), longest_run: rest.get_u16() };
        if report.received > report.seen || report.longest_run > report.seen {
            return Err(FecError::Range("report"));
        }
        let verdict = match kind {
            NEED => Verdict::Need(Need::parse(&mut rest).ok_or(bad_length)?),
            DONE => Verdict::Done,
            _ => Verdict::Abandoned,
        };
        if !rest.is_empty() {
            return Err(bad_length);
        }
        Ok(Self::Feedback(Feedback { message, report, verdict }))
    }
}

impl Symbol<'_> {
    /// Writes the header of the symbol at `position`, to be followed by the symbol.
    pub(crate) fn write_header(message: u32, layout: &Layout, position: usize, repairs: usize, out: &mut Vec<u8>) {
        let (block, index) = layout.symbol(position);
        out.put_u8(SYMBOL);
        out.put_u8(block as u8);
        out.put_u16(index as u16);
        out.put_u32(message);
        out.put_u32(layout.message_length as u32);
        out.put_u16(repairs as u16);
    }
}

impl Feedback {
    /// The datagram. Of the missing sources it names as many as have room.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        out.put_u8(match self.verdict {
            Verdict::Done => DONE,
            Verdict::Abandoned => ABANDONED,
            Verdict::Need(_) => NEED,
        });
        out.put_u32(self.message);
        out.put_u16(self.report.seen);
        out.put_u16(self.report.received);
        out.put_u16(self.report.longest_run);
        if let Verdict::Need(need) = &self.verdict {
            out.put_u8(need.lacks.len() as u8);
            for &(block, lack) in &need.lacks {
                out.put_u8(block);
                out.put_u16(lack);
            }
            let room = (MAX_FEEDBACK - out.len()) / 4;
            for &(first, count) in need.missing.iter().take(room) {
                out.put_u16(first);
                out.put_u16(count);
            }
        }
        out
    }
}

impl Need {
    fn parse(rest: &mut &[u8]) -> Option<Self> {
        let blocks = usize::from(rest.try_get_u8().ok()?);
        if blocks > MAX_BLOCKS || rest.len() < 3 * blocks {
            return None;
        }
        let lacks = (0..blocks).map(|_| (rest.get_u8(), rest.get_u16())).collect();
        if !rest.len().is_multiple_of(4) {
            return None;
        }
        let missing = (0..rest.len() / 4).map(|_| (rest.get_u16(), rest.get_u16())).collect();
        Some(Self { lacks, missing })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feedback_comes_back_as_it_was() {
        let report = Report { seen: 400, received: 380, longest_run: 7 };
        let need = Need { lacks: vec![(0, 3), (2, 700)], missing: vec![(5, 1), (90, 12)] };
        for verdict in [Verdict::Done, Verdict::Abandoned, Verdict::Need(need)] {
            let feedback = Feedback { message: 9, report, verdict };
            assert_eq!(Datagram::parse(&feedback.encode()), Ok(Datagram::Feedback(feedback)));
        }
    }

    #[test]
    fn no_need_is_longer_than_a_datagram() {
        let need = Need {
            lacks: (0..MAX_BLOCKS as u8).map(|block| (block, 9)).collect(),
            missing: (0..5000).map(|i| (3 * i, 1)).collect(),
        };
        let feedback = Feedback { message: 1, report: Report::default(), verdict: Verdict::Need(need) };
        let encoded = feedback.encode();
        assert!((MAX_FEEDBACK - 4..=MAX_FEEDBACK).contains(&encoded.len()));
        assert!(matches!(Datagram::parse(&encoded), Ok(Datagram::Feedback(_))));
    }

    #[test]
    fn every_truncation_is_refused() {
        let need = Need { lacks: vec![(0, 3)], missing: vec![(5, 1)] };
        let report = Report { seen: 4, received: 3, longest_run: 1 };
        let whole = Feedback { message: 9, report, verdict: Verdict::Need(need) }.encode();
        for length in (0..whole.len()).filter(|&length| length != whole.len() - 4) {
            assert!(Datagram::parse(&whole[..length]).is_err(), "{length}");
        }
        assert_eq!(Datagram::parse(&[SYMBOL; SYMBOL_HEADER]), Err(FecError::Length(SYMBOL_HEADER)));
        assert_eq!(Datagram::parse(&[0x21; 40]), Err(FecError::Kind(0x21)));
    }
}
