//! Flows over a shared bottleneck, event by event.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::link::{Link, Shape};

/// IP, UDP and QUIC around a datagram's payload.
const OVERHEAD: usize = 28 + 30;
const ACK_BYTES: usize = 28 + 45;
const PROBE_BYTES: usize = 28 + 30;
const MTU: u64 = 1452;
const MAX_ACK_DELAY: Duration = Duration::from_millis(1);
const PACKET_THRESHOLD: u64 = 3;
/// A test that has more than this outstanding, or waits for longer than this, does not end by itself.
const MAX_OUTSTANDING: usize = 200_000;
const MAX_TIME: Duration = Duration::from_secs(600);
const INITIAL_RTT: Duration = Duration::from_millis(25);

/// A congestion window, told what quinn tells its controllers.
pub trait Window {
    /// A packet was sent.
    #[allow(unused_variables)]
    fn on_sent(&mut self, now: Instant, bytes: usize) {}
    /// A packet that was sent at `sent` has arrived.
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: usize);
    /// The last of a batch of acknowledgements with one `now`.
    #[allow(unused_variables)]
    fn on_end_acks(&mut self, now: Instant, in_flight: u64) {}
    /// Packets were lost, of which the newest was sent at `sent`; `persistent` when nothing got through for long.
    fn on_lost(&mut self, now: Instant, sent: Instant, persistent: bool, bytes: usize);
    /// Bytes that may be in flight.
    fn window(&self) -> u64;
}

/// A window that never changes.
#[derive(Debug, Clone, Copy)]
pub struct Fixed(pub u64);

impl Window for Fixed {
    fn on_ack(&mut self, _now: Instant, _sent: Instant, _bytes: usize) {}
    fn on_lost(&mut self, _now: Instant, _sent: Instant, _persistent: bool, _bytes: usize) {}
    fn window(&self) -> u64 {
        self.0
    }
}

/// The two ends of a flow. What the near end sends crosses the first link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The robot's, say.
    Near,
    /// The server's.
    Far,
}

impl End {
    fn other(self) -> Self {
        match self {
            Self::Near => Self::Far,
            Self::Far => Self::Near,
        }
    }
}

/// What a test hears of.
#[derive(Debug)]
pub enum Event {
    /// A datagram arrived at an end of a flow.
    Datagram {
        /// Number of the flow.
        flow: usize,
        /// Where.
        end: End,
        /// What was sent.
        payload: Bytes,
    },
    /// A timer set by [`World::set_timer`] went off.
    Timer(u64),
}

/// Two links and the flows on them.
pub struct World {
    /// The simulated time.
    pub now: Instant,
    start: Instant,
    links: [Link; 2],
    flows: Vec<[Sender; 2]>,
    events: BinaryHeap<Reverse<Entry>>,
    scheduled: u64,
}

impl World {
    /// A world whose two directions are `near_to_far` and `far_to_near`.
    pub fn new(near_to_far: Shape, far_to_near: Shape, seed: u64) -> Self {
        let now = Instant::now();
        Self {
            now,
            start: now,
            links: [Link::new(near_to_far, now, seed), Link::new(far_to_near, now, !seed)],
            flows: Vec::new(),
            events: BinaryHeap::new(),
            scheduled: 0,
        }
    }

    /// Adds a flow whose ends send under `near` and `far`, and returns its number.
    pub fn add_flow(&mut self, near: impl Window + 'static, far: impl Window + 'static) -> usize {
        self.flows.push([Sender::new(Box::new(near), self.now), Sender::new(Box::new(far), self.now)]);
        self.flows.len() - 1
    }

    /// The link on which `end` sends.
    pub fn link(&mut self, end: End) -> &mut Link {
        &mut self.links[end as usize]
    }

    /// The congestion window of `end`, in bytes.
    pub fn window(&self, flow: usize, end: End) -> u64 {
        self.flows[flow][end as usize].window.window()
    }

    /// Datagrams that `end` has not yet been able to send.
    pub fn queued(&self, flow: usize, end: End) -> usize {
        self.flows[flow][end as usize].queue.len()
    }

    /// The smoothed round trip as `end` measures it.
    pub fn round_trip(&self, flow: usize, end: End) -> Duration {
        self.flows[flow][end as usize].smoothed()
    }

    /// Queues a datagram at `end`.
    pub fn send(&mut self, flow: usize, end: End, payload: Bytes) {
        self.flows[flow][end as usize].queue.push_back(payload);
        self.transmit(flow, end);
    }

    /// Has [`World::next_event`] return `Event::Timer(id)` at `at`.
    pub fn set_timer(&mut self, at: Instant, id: u64) {
        self.schedule(at.max(self.now), What::Timer(id));
    }

    /// Runs until something happens that the test has to know of; `None` when nothing is left to happen.
    ///
    /// # Panics
    /// When the simulation runs away: after ten simulated minutes, or with 200,000 events outstanding.
    pub fn next_event(&mut self) -> Option<Event> {
        while let Some(Reverse(entry)) = self.events.pop() {
            assert!(entry.at - self.start < MAX_TIME, "the simulation does not end");
            self.now = entry.at;
            match entry.what {
                What::Timer(id) => return Some(Event::Timer(id)),
                What::Arrival { flow, end, packet } => {
                    if let Some(payload) = self.receive(flow, end, packet) {
                        return Some(Event::Datagram { flow, end, payload });
                    }
                }
                What::Pace { flow, end } => {
                    self.flows[flow][end as usize].pacing = false;
                    self.transmit(flow, end);
                }
                What::Acknowledge { flow, end } => self.acknowledge(flow, end),
                What::Probe { flow, end, after } => self.probe(flow, end, after),
            }
        }
        None
    }

    fn schedule(&mut self, at: Instant, what: What) {
        assert!(self.events.len() < MAX_OUTSTANDING, "events breed events");
        self.scheduled += 1;
        self.events.push(Reverse(Entry { at, order: self.scheduled, what }));
    }

    /// Sends what window and pacing let go.
    fn transmit(&mut self, flow: usize, end: End) {
        loop {
            let sender = &mut self.flows[flow][end as usize];
            let Some(payload) = sender.queue.front() else {
                return;
            };
            let bytes = payload.len() + OVERHEAD;
            if sender.in_flight + bytes as u64 >= sender.window.window() {
                return;
            }
            if let Some(at) = sender.pacing_delay(self.now, bytes as u64) {
                if !std::mem::replace(&mut sender.pacing, true) {
                    self.schedule(at, What::Pace { flow, end });
                }
                return;
            }
            let payload = sender.queue.pop_front();
            self.transmit_one(flow, end, payload, bytes);
        }
    }

    fn transmit_one(&mut self, flow: usize, end: End, payload: Option<Bytes>, bytes: usize) {
        let sender = &mut self.flows[flow][end as usize];
        let number = sender.on_sent(self.now, bytes);
        let probe_at = self.now + sender.probe_timeout();
        if let Some(at) = self.links[end as usize].send(self.now, bytes) {
            let packet = Packet::Data { number, payload };
            self.schedule(at, What::Arrival { flow, end: end.other(), packet });
        }
        self.schedule(probe_at, What::Probe { flow, end, after: number });
    }

    fn receive(&mut self, flow: usize, end: End, packet: Packet) -> Option<Bytes> {
        match packet {
            Packet::Data { number, payload } => {
                let receiver = &mut self.flows[flow][end as usize];
                receiver.received.insert(number);
                receiver.unacknowledged += 1;
                if receiver.unacknowledged >= 2 {
                    self.acknowledge(flow, end);
                } else {
                    self.schedule(self.now + MAX_ACK_DELAY, What::Acknowledge { flow, end });
                }
                payload
            }
            Packet::Ack(ranges) => {
                self.flows[flow][end as usize].on_ack(self.now, &ranges);
                self.transmit(flow, end);
                None
            }
        }
    }

    fn acknowledge(&mut self, flow: usize, end: End) {
        let receiver = &mut self.flows[flow][end as usize];
        if std::mem::take(&mut receiver.unacknowledged) == 0 {
            return;
        }
        let packet = Packet::Ack(receiver.received.0.clone());
        if let Some(at) = self.links[end as usize].send(self.now, ACK_BYTES) {
            self.schedule(at, What::Arrival { flow, end: end.other(), packet });
        }
    }

    /// Sends something to be acknowledged when nothing was since packet `after`, which is still the newest.
    fn probe(&mut self, flow: usize, end: End, after: u64) {
        let sender = &self.flows[flow][end as usize];
        if sender.next_number == after + 1 && sender.sent.contains_key(&after) {
            self.transmit_one(flow, end, None, PROBE_BYTES);
        }
    }
}

struct Entry {
    at: Instant,
    order: u64,
    what: What,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

enum What {
    Timer(u64),
    Arrival { flow: usize, end: End, packet: Packet },
    Pace { flow: usize, end: End },
    Acknowledge { flow: usize, end: End },
    Probe { flow: usize, end: End, after: u64 },
}

enum Packet {
    Data { number: u64, payload: Option<Bytes> },
    Ack(Vec<(u64, u64)>),
}

/// Received packet numbers as ranges, both ends included, oldest first.
#[derive(Default)]
struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    const MOST: usize = 64;

    fn insert(&mut self, number: u64) {
        let at = self.0.partition_point(|&(_, last)| last + 1 < number);
        match self.0.get_mut(at) {
            Some(range) if range.0 <= number && number <= range.1 => return,
            Some(range) if range.1 + 1 == number => range.1 = number,
            Some(range) if number + 1 == range.0 => range.0 = number,
            _ => self.0.insert(at, (number, number)),
        }
        if let Some(&next) = self.0.get(at + 1)
            && self.0[at].1 + 1 >= next.0
        {
            self.0[at].1 = next.1;
            self.0.remove(at + 1);
        }
        if self.0.len() > Self::MOST {
            self.0.remove(0);
        }
    }
}

/// One end of a flow: what it sends, and what it has received and acknowledges.
struct Sender {
    window: Box<dyn Window>,
    queue: VecDeque<Bytes>,
    sent: BTreeMap<u64, (Instant, usize)>,
    next_number: u64,
    in_flight: u64,
    largest_acked: Option<u64>,
    smoothed: Option<Duration>,
    latest: Duration,
    variance: Duration,
    tokens: f64,
    refilled: Instant,
    pacing: bool,
    received: Ranges,
    unacknowledged: u32,
}

impl Sender {
    fn new(window: Box<dyn Window>, now: Instant) -> Self {
        Self {
            window,
            queue: VecDeque::new(),
            sent: BTreeMap::new(),
            next_number: 0,
            in_flight: 0,
            largest_acked: None,
            smoothed: None,
            latest: INITIAL_RTT,
            variance: INITIAL_RTT / 2,
            tokens: f64::MAX,
            refilled: now,
            pacing: false,
            received: Ranges::default(),
            unacknowledged: 0,
        }
    }

    fn smoothed(&self) -> Duration {
        self.smoothed.unwrap_or(self.latest)
    }

    fn probe_timeout(&self) -> Duration {
        self.smoothed() + (4 * self.variance).max(Duration::from_millis(1)) + MAX_ACK_DELAY
    }

    /// quinn's token bucket: when the next packet may go, `None` for now.
    fn pacing_delay(&mut self, now: Instant, bytes: u64) -> Option<Instant> {
        let window = self.window.window() as f64;
        let rate = 1.25 * window / self.smoothed().as_secs_f64();
        let capacity = (window * 0.002 / self.smoothed().as_secs_f64()).clamp((10 * MTU) as f64, (256 * MTU) as f64);
        self.tokens = (self.tokens + rate * (now - self.refilled).as_secs_f64()).min(capacity);
        self.refilled = now;
        // A nanosecond's worth may be missing after rounding.
        if self.tokens + 1.0 >= bytes as f64 {
            return None;
        }
        Some(now + Duration::from_secs_f64((capacity - self.tokens) / rate))
    }

    fn on_sent(&mut self, now: Instant, bytes: usize) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.sent.insert(number, (now, bytes));
        self.in_flight += bytes as u64;
        self.tokens -= bytes as f64;
        self.window.on_sent(now, bytes);
        number
    }

    fn on_ack(&mut self, now: Instant, ranges: &[(u64, u64)]) {
        let mut newest = None;
        for &(first, last) in ranges {
            let numbers: Vec<u64> = self.sent.range(first..=last).map(|(&number, _)| number).collect();
            for number in numbers {
                let Some((sent, bytes)) = self.sent.remove(&number) else {
                    continue;
                };
                self.in_flight -= bytes as u64;
                self.window.on_ack(now, sent, bytes);
                newest = newest.max(Some((number, sent)));
            }
        }
        let Some((number, sent)) = newest else { return };
        self.window.on_end_acks(now, self.in_flight);
        if self.largest_acked < Some(number) {
            self.largest_acked = Some(number);
            self.latest = now - sent;
            if let Some(smoothed) = self.smoothed {
                self.variance = (3 * self.variance + smoothed.abs_diff(self.latest)) / 4;
                self.smoothed = Some((7 * smoothed + self.latest) / 8);
            } else {
                self.variance = self.latest / 2;
                self.smoothed = Some(self.latest);
            }
        }
        self.detect_losses(now);
    }

    /// Packets overtaken by `PACKET_THRESHOLD` others, or by any after 9/8 of a round trip, are lost.
    fn detect_losses(&mut self, now: Instant) {
        let Some(largest) = self.largest_acked else {
            return;
        };
        let patience = self.smoothed().max(self.latest) * 9 / 8;
        let lost: Vec<u64> = self
            .sent
            .range(..largest)
            .filter(|&(&number, &(sent, _))| number + PACKET_THRESHOLD <= largest || now - sent >= patience)
            .map(|(&number, _)| number)
            .collect();
        let (mut bytes_lost, mut span) = (0, None::<(Instant, Instant)>);
        for number in lost {
            let Some((sent, bytes)) = self.sent.remove(&number) else {
                continue;
            };
            self.in_flight -= bytes as u64;
            bytes_lost += bytes;
            span = Some((span.map_or(sent, |(first, _)| first), sent));
        }
        if let Some((first, last)) = span {
            let persistent = last - first > 3 * self.probe_timeout();
            self.window.on_lost(now, last, persistent, bytes_lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_merge_in_any_order() {
        let mut ranges = Ranges::default();
        for number in [5, 1, 3, 2, 5, 4, 9] {
            ranges.insert(number);
        }
        assert_eq!(ranges.0, [(1, 5), (9, 9)]);
    }

    #[test]
    fn a_message_takes_the_round_trip_and_its_bytes() {
        let shape = Shape::new(Duration::from_millis(20), 100.0);
        let mut world = World::new(shape, shape, 1);
        let flow = world.add_flow(Fixed(1 << 20), Fixed(1 << 20));
        let start = world.now;
        for _ in 0..100 {
            world.send(flow, End::Near, Bytes::from(vec![0; 1192]));
        }
        let mut arrived = 0;
        while let Some(event) = world.next_event() {
            if matches!(event, Event::Datagram { end: End::Far, .. }) {
                arrived += 1;
                if arrived == 100 {
                    // 100 packets of 1250 bytes at 12.5 MB/s take 10 ms, one way another 10.
                    assert_eq!((world.now - start).as_micros(), 20_000);
                }
            }
        }
        assert_eq!(arrived, 100);
    }
}
