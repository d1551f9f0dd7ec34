//! The receiving end of a connection: its open messages.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::FecError;
use crate::code;
use crate::datagram::{Feedback, Need, Report, Symbol, Verdict};
use crate::layout::Layout;

/// Shortest silence in the middle of a flight after which more is asked for. Less than this misfires on the pauses of
/// ordinary schedulers.
const MIN_SILENCE: Duration = Duration::from_millis(12);
const MAX_SILENCE: Duration = Duration::from_millis(200);
/// Shortest wait for symbols that were overtaken, once the end of the flight is there.
const MIN_SETTLE: Duration = Duration::from_millis(1);
/// Needs without a symbol in answer, before the message is left to the stream.
const MAX_NEEDS: u32 = 4;
/// Finished messages that are remembered, so that their late symbols are ignored.
const REMEMBERED: usize = 256;

/// What a peer may make a receiver hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest message, in bytes.
    pub message_length: usize,
    /// Messages open at a time.
    pub messages: usize,
    /// Bytes of all open messages together, repair symbols included.
    pub bytes: usize,
    /// After which an open message is left to the stream.
    pub age: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { message_length: crate::MAX_MESSAGE_LENGTH, messages: 32, bytes: 48 << 20, age: Duration::from_secs(10) }
    }
}

/// What a symbol led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A message is complete.
    Complete {
        /// Its id.
        message: u32,
        /// Its bytes.
        body: Bytes,
        /// Datagram to send to the peer.
        feedback: Bytes,
    },
    /// A datagram to send to the peer: a message is beyond the limits, or the sender has not heard how one ended.
    Feedback(Bytes),
}

/// The open messages of one direction of a connection.
///
/// Hand it every [`Symbol`], and after each of these and of its own timeouts ask [`poll_timeout`](Self::poll_timeout)
/// when it next wants [`on_timeout`](Self::on_timeout).
#[derive(Debug)]
pub struct Receiver {
    limits: Limits,
    open: BTreeMap<u32, Incoming>,
    /// That the open messages may come to hold.
    bytes: usize,
    /// Messages that are no longer open, and whether they are left to the stream.
    finished: VecDeque<(u32, bool)>,
    gap: Gap,
}

impl Receiver {
    /// A receiver without messages.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            open: BTreeMap::new(),
            bytes: 0,
            finished: VecDeque::with_capacity(REMEMBERED),
            gap: Gap::default(),
        }
    }

    /// Takes in a symbol. The last of a flight is answered however late it comes, so that a sender that did not hear how
    /// its message ended can ask with it. An error says that the peer breaks the protocol; the open messages stay as they are.
    pub fn on_symbol(&mut self, now: Instant, symbol: &Symbol) -> Result<Option<Event>, FecError> {
        let id = symbol.message;
        if !self.open.contains_key(&id) {
            if let Some(abandoned) = self.finished(id) {
                let last = symbol.position + 1 == symbol.flight;
                let verdict = if abandoned { Verdict::Abandoned } else { Verdict::Done };
                return Ok(last.then(|| Event::Feedback(feedback(id, Report::default(), verdict))));
            }
            if !self.open(now, symbol) {
                return Ok(Some(Event::Feedback(self.abandon(id))));
            }
        }
        let Some(incoming) = self.open.get_mut(&id) else { return Ok(None) };
        if incoming.layout != symbol.layout || incoming.flight != symbol.flight {
            return Err(FecError::Inconsistent(id));
        }
        if !incoming.store(symbol) {
            return Ok(None);
        }
        if let Some(last) = incoming.last_arrival.replace(now) {
            self.gap.on_gap(now.saturating_duration_since(last));
        }
        if incoming.incomplete > 0 {
            incoming.needs = 0;
            let at_end = incoming.asked || incoming.have[incoming.flight - 1];
            incoming.ask_at = now + if at_end { self.gap.settle() } else { self.gap.silence() };
            return Ok(None);
        }
        let Some(incoming) = self.finish(id, false) else { return Ok(None) };
        let feedback = feedback(id, incoming.report(), Verdict::Done);
        Ok(Some(Event::Complete { message: id, body: incoming.into_body()?, feedback }))
    }

    /// Bytes that the open messages hold: what has arrived of them, and a little for each symbol that is expected.
    pub fn held(&self) -> usize {
        self.open.values().map(|incoming| incoming.held).sum()
    }

    /// Leaves a message to the stream: the datagram that tells the peer.
    pub fn abandon(&mut self, message: u32) -> Bytes {
        self.finish(message, true);
        feedback(message, Report::default(), Verdict::Abandoned)
    }

    /// Forgets a message, which came over the stream or is no longer wanted, and ignores its symbols from here on.
    pub fn cancel(&mut self, message: u32) {
        self.finish(message, false);
    }

    /// When [`on_timeout`](Self::on_timeout) is next wanted.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.open.values().map(|incoming| incoming.ask_at.min(incoming.expires_at)).min()
    }

    /// Asks for what is missing, and gives up what has been asked for in vain: datagrams to send to the peer. An answer
    /// takes a `round_trip`.
    pub fn on_timeout(&mut self, now: Instant, round_trip: Duration) -> Vec<Bytes> {
        let mut datagrams = Vec::new();
        let mut abandoned = Vec::new();
        for (&message, incoming) in &mut self.open {
            let expired = now >= incoming.expires_at;
            if !expired && now < incoming.ask_at {
                continue;
            }
            let verdict = if expired || incoming.needs == MAX_NEEDS {
                abandoned.push(message);
                Verdict::Abandoned
            } else {
                Verdict::Need(incoming.need())
            };
            datagrams.push(feedback(message, incoming.report(), verdict));
            incoming.asked = true;
            incoming.ask_at = now + (round_trip + self.gap.silence()) * (1 << incoming.needs);
            incoming.needs += 1;
        }
        for message in abandoned {
            self.finish(message, true);
        }
        datagrams
    }

    /// Opens a message if the limits permit.
    fn open(&mut self, now: Instant, symbol: &Symbol) -> bool {
        let layout = symbol.layout;
        let fits = layout.message_length <= self.limits.message_length
            && self.open.len() < self.limits.messages
            && self.bytes + layout.memory() <= self.limits.bytes;
        if fits {
            self.bytes += layout.memory();
            let ask_at = now + self.gap.silence();
            self.open.insert(symbol.message, Incoming::new(symbol, ask_at, now + self.limits.age));
        }
        fits
    }

    /// Whether a message that is no longer open was left to the stream; none for one that is not remembered.
    fn finished(&self, id: u32) -> Option<bool> {
        self.finished.iter().find_map(|&(finished, abandoned)| (finished == id).then_some(abandoned))
    }

    fn finish(&mut self, id: u32, abandoned: bool) -> Option<Incoming> {
        if self.finished(id).is_none() {
            if self.finished.len() == REMEMBERED {
                self.finished.pop_front();
            }
            self.finished.push_back((id, abandoned));
        }
        let incoming = self.open.remove(&id)?;
        self.bytes -= incoming.layout.memory();
        Some(incoming)
    }
}

fn feedback(message: u32, report: Report, verdict: Verdict) -> Bytes {
    Feedback { message, report, verdict }.encode().into()
}

/// A message in arrival.
#[derive(Debug)]
struct Incoming {
    layout: Layout,
    flight: usize,
    /// The sources in their places, the last one with its padding. The pages of what has not arrived are untouched.
    padded: Vec<u8>,
    /// By position.
    have: Vec<bool>,
    /// Repair symbols, by position.
    repairs: Vec<(usize, Vec<u8>)>,
    /// Symbols that each block still wants.
    lacks: Vec<usize>,
    /// Blocks that want any.
    incomplete: usize,
    held: usize,
    last_arrival: Option<Instant>,
    ask_at: Instant,
    expires_at: Instant,
    asked: bool,
    /// Needs since the last symbol.
    needs: u32,
}

impl Incoming {
    fn new(symbol: &Symbol, ask_at: Instant, expires_at: Instant) -> Self {
        let layout = symbol.layout;
        Self {
            layout,
            flight: symbol.flight,
            padded: vec![0; layout.sources * layout.symbol_length],
            have: vec![false; layout.symbols()],
            repairs: Vec::new(),
            lacks: (0..layout.blocks).map(|block| layout.block_sources(block)).collect(),
            incomplete: layout.blocks,
            held: layout.symbols(),
            last_arrival: None,
            ask_at,
            expires_at,
            asked: false,
            needs: 0,
        }
    }

    /// Keeps a symbol; false when it is there already.
    fn store(&mut self, symbol: &Symbol) -> bool {
        if std::mem::replace(&mut self.have[symbol.position], true) {
            return false;
        }
        self.held += symbol.data.len();
        let (block, _) = self.layout.symbol(symbol.position);
        let lack = &mut self.lacks[block];
        if symbol.position < self.layout.sources {
            let start = symbol.position * self.layout.symbol_length;
            self.padded[start..start + self.layout.symbol_length].copy_from_slice(symbol.data);
        } else if *lack > 0 {
            self.repairs.push((symbol.position, symbol.data.to_vec()));
        }
        if *lack > 0 {
            *lack -= 1;
            self.incomplete -= usize::from(*lack == 0);
        }
        true
    }

    /// What arrived of the flight up to the last symbol that did.
    fn report(&self) -> Report {
        let (mut seen, mut received, mut run, mut longest_run) = (0, 0, 0, 0);
        for (position, &have) in self.have[..self.flight].iter().enumerate() {
            if have {
                (seen, received) = (position + 1, received + 1);
                longest_run = longest_run.max(std::mem::take(&mut run));
            } else {
                run += 1;
            }
        }
        Report { seen: seen as u16, received, longest_run }
    }

    fn need(&self) -> Need {
        let lacks = self.lacks.iter().enumerate().filter(|&(_, &lack)| lack > 0);
        let mut missing: Vec<(u16, u16)> = Vec::new();
        for position in (0..self.layout.sources).filter(|&position| !self.have[position]) {
            match missing.last_mut() {
                Some((first, count)) if usize::from(*first + *count) == position => *count += 1,
                _ => missing.push((position as u16, 1)),
            }
        }
        Need { lacks: lacks.map(|(block, &lack)| (block as u8, lack as u16)).collect(), missing }
    }

    /// The message; blocks whose sources did not all arrive are decoded.
    fn into_body(mut self) -> Result<Bytes, FecError> {
        let layout = self.layout;
        for block in 0..layout.blocks {
            if (block..layout.sources).step_by(layout.blocks).all(|position| self.have[position]) {
                continue;
            }
            let repairs = self.repairs.iter().filter_map(|(position, symbol)| {
                let (of, index) = layout.symbol(*position);
                (of == block).then(|| (index - layout.block_sources(block), symbol.as_slice()))
            });
            code::decode(&mut self.padded, &layout, block, &self.have, repairs)
                .map_err(|_| FecError::Range("symbols of a complete block"))?;
        }
        self.padded.truncate(layout.message_length);
        Ok(self.padded.into())
    }
}

/// The time between symbols of a message, as mean and mean deviation, and the waits that follow from it: an arrival
/// later than mean + 4 × deviation is one that does not come.
#[derive(Debug, Default)]
struct Gap {
    mean: Duration,
    deviation: Duration,
}

impl Gap {
    fn on_gap(&mut self, gap: Duration) {
        let gap = gap.min(MAX_SILENCE);
        self.deviation = (31 * self.deviation + gap.abs_diff(self.mean)) / 32;
        self.mean = (31 * self.mean + gap) / 32;
    }

    fn silence(&self) -> Duration {
        (self.mean + 4 * self.deviation).clamp(MIN_SILENCE, MAX_SILENCE)
    }

    fn settle(&self) -> Duration {
        (self.mean + 4 * self.deviation).clamp(MIN_SETTLE, MIN_SILENCE)
    }
}
