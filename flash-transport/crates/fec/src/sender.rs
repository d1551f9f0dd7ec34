//! The sending end of one message.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::code;
use crate::datagram::{Feedback, Need, SYMBOL_HEADER, Symbol, Verdict};
use crate::layout::Layout;
use crate::{FecError, Redundancy};

/// Needs that are answered before the stream is used.
const MAX_ANSWERS: u32 = 4;

/// Without a word from the receiver for three round trips and this long, the sender asks how the message stands.
const PATIENCE: Duration = Duration::from_millis(25);

/// Questions without an answer before the stream is used.
const MAX_PROBES: u32 = 3;

/// One message on its way.
///
/// Send what [`next_datagram`](Self::next_datagram) gives, say when the last of it has left
/// ([`flight_sent`](Self::flight_sent)), then do what the [`Answer`]s to the receiver's feedback and to the passing of
/// [`poll_timeout`](Self::poll_timeout) say. Whatever else proves that the message arrived, as a reply does, ends it too.
#[derive(Debug, Clone)]
pub struct Sender {
    id: u32,
    message: Bytes,
    layout: Layout,
    /// Repair symbols for every block, sent unasked.
    repairs: usize,
    next_position: usize,
    encoded: Vec<Vec<u8>>,
    /// Repair symbols of every block that have been sent, answers included.
    repairs_sent: usize,
    sent_at: Option<Instant>,
    deadline: Option<Instant>,
    answers: u32,
    /// Since the receiver was last heard of.
    probes: u32,
    reported: bool,
}

/// What the sender has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The receiver has the message.
    Done,
    /// These datagrams, none where the feedback was overtaken by what is on its way.
    Send(Vec<Bytes>),
    /// The whole message over the stream.
    UseStream,
}

impl Sender {
    /// Cuts `message` (1 byte to 16 MiB) into datagrams of at most `max_datagram_length` bytes. `id` names it on its
    /// connection and direction, and is not used again.
    pub fn new(id: u32, message: Bytes, max_datagram_length: usize, redundancy: &Redundancy) -> Result<Self, FecError> {
        let layout = Layout::fit(message.len(), max_datagram_length.saturating_sub(SYMBOL_HEADER))?;
        let repairs = redundancy.repairs(layout.block_sources(0)).min(layout.repairs);
        Ok(Self {
            id,
            message,
            layout,
            repairs,
            next_position: 0,
            encoded: Vec::new(),
            repairs_sent: repairs,
            sent_at: None,
            deadline: None,
            answers: 0,
            probes: 0,
            reported: false,
        })
    }

    /// The next datagram to be sent unasked: the sources, then the repair symbols, which are computed when their turn
    /// comes.
    pub fn next_datagram(&mut self) -> Option<Bytes> {
        let position = self.next_position;
        if position == self.layout.flight(self.repairs) {
            self.encoded = Vec::new();
            return None;
        }
        self.next_position += 1;
        let Some(repair) = position.checked_sub(self.layout.sources) else {
            return Some(self.source(position));
        };
        if repair == 0 {
            self.encoded = self.encode(0..self.repairs);
        }
        Some(self.datagram(position, &self.encoded[repair]))
    }

    /// Notes that the last datagram, of the flight or of an answer, has left the transport's queue.
    pub fn flight_sent(&mut self, now: Instant, round_trip: Duration) {
        self.sent_at = Some(now);
        self.deadline = Some(now + 3 * round_trip + PATIENCE);
    }

    /// When [`on_timeout`](Self::on_timeout) is wanted, unless the receiver is heard of before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadline
    }

    /// Nothing was heard for long: asks with the last symbol of the flight, or uses the stream.
    pub fn on_timeout(&mut self, now: Instant, round_trip: Duration) -> Answer {
        if self.probes == MAX_PROBES {
            return Answer::UseStream;
        }
        self.probes += 1;
        self.deadline = Some(now + 3 * round_trip + PATIENCE);
        let last = self.encode(self.repairs - 1..self.repairs).pop();
        let position = self.layout.flight(self.repairs) - 1;
        Answer::Send(last.iter().map(|symbol| self.datagram(position, symbol)).collect())
    }

    /// Takes in feedback on this message; `redundancy` learns from the first that speaks of the whole flight.
    pub fn on_feedback(
        &mut self,
        now: Instant,
        round_trip: Duration,
        feedback: &Feedback,
        redundancy: &mut Redundancy,
    ) -> Answer {
        self.probes = 0;
        let flight = self.layout.flight(self.repairs);
        let report = feedback.report;
        let (seen, received) = (usize::from(report.seen).min(flight), usize::from(report.received));
        let need = match &feedback.verdict {
            Verdict::Done => {
                if !std::mem::replace(&mut self.reported, true) {
                    redundancy.on_report(seen, seen.saturating_sub(received), report.longest_run.into());
                }
                return Answer::Done;
            }
            Verdict::Abandoned => return Answer::UseStream,
            Verdict::Need(need) => need,
        };
        let overtaken = match self.sent_at {
            None => true,
            Some(sent_at) => now < sent_at + round_trip && (self.answers > 0 || seen < flight),
        };
        if overtaken {
            return Answer::Send(Vec::new());
        }
        if !std::mem::replace(&mut self.reported, true) {
            let run = usize::from(report.longest_run).max(flight - seen);
            redundancy.on_report(flight, flight.saturating_sub(received), run);
        }
        if self.answers == MAX_ANSWERS {
            return Answer::UseStream;
        }
        self.answers += 1;
        let datagrams = self.answer(need, redundancy.loss());
        self.flight_sent(now, round_trip);
        Answer::Send(datagrams)
    }

    /// For every incomplete block as many fresh repair symbols as it lacks, and more for those that will get lost too;
    /// missing sources where the repair symbols do not suffice.
    fn answer(&mut self, need: &Need, loss: f64) -> Vec<Bytes> {
        let layout = self.layout;
        let mut wanted = vec![0; layout.blocks];
        for &(block, lack) in &need.lacks {
            let block = usize::from(block);
            if block < layout.blocks {
                let lack = usize::from(lack).min(layout.block_sources(block));
                wanted[block] = lack + (2.0 * loss * lack as f64).ceil() as usize + 2;
            }
        }
        let fresh = wanted.iter().copied().max().unwrap_or(0).min(layout.repairs - self.repairs_sent);
        let first = self.repairs_sent;
        self.repairs_sent += fresh;
        let repairs = self.encode(first..self.repairs_sent);
        let mut datagrams = Vec::new();
        for (position, symbol) in (layout.flight(first)..).zip(&repairs) {
            let (block, _) = layout.symbol(position);
            if wanted[block] > 0 {
                wanted[block] -= 1;
                datagrams.push(self.datagram(position, symbol));
            }
        }
        for &(first, count) in &need.missing {
            for position in (usize::from(first)..layout.sources).take(count.into()) {
                let wanted = &mut wanted[position % layout.blocks];
                if *wanted > 0 {
                    *wanted -= 1;
                    datagrams.push(self.source(position));
                }
            }
        }
        datagrams
    }

    fn source(&self, position: usize) -> Bytes {
        let mut out = self.header(position);
        code::source(&self.message, &self.layout, position, &mut out);
        out.into()
    }

    fn datagram(&self, position: usize, symbol: &[u8]) -> Bytes {
        let mut out = self.header(position);
        out.extend_from_slice(symbol);
        out.into()
    }

    fn header(&self, position: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(SYMBOL_HEADER + self.layout.symbol_length);
        Symbol::write_header(self.id, &self.layout, position, self.repairs, &mut out);
        out
    }

    /// Repair symbols `wanted` of every block, in the order of sending.
    fn encode(&self, wanted: std::ops::Range<usize>) -> Vec<Vec<u8>> {
        if wanted.is_empty() {
            return Vec::new();
        }
        let mut blocks: Vec<_> = (0..self.layout.blocks)
            .map(|block| {
                code::encode(&self.message, &self.layout, block, wanted.clone())
                    .expect("a layout within the code's limits")
                    .into_iter()
            })
            .collect();
        wanted.flat_map(|_| blocks.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>()).collect()
    }
}
