//! The window, from what bursts of packets tell of the bottleneck.
//!
//! ```text
//! window = gain · rate · base        pacing (quinn's) = 1.25 · window / smoothed round trip
//! ```
//!
//! - **A sample** is a run of packets sent in one burst, closed when all of it is accounted for, at the latest after a
//!   round trip of acknowledgements. It has a rate at which it was sent and one at which it was acknowledged.
//! - **base** is the round trip of a burst's first packets: the link and whatever queue others keep there. What a burst's
//!   last packets took longer is a queue that the burst itself built. Measured against the least round trip ever seen
//!   instead, a competitor's queue would look like ours, and our share would shrink to nothing.
//! - **rate** rises to any sample of which both rates are above it, so that neither a burst into a buffer nor
//!   acknowledgements that arrive bunched look like a fast link. It falls to the acknowledged rate of a sample that was
//!   offered as much as the rate and met a queue of its own making, heavy losses or congestion marks, for that is what
//!   the bottleneck carries. A burst that was merely short or slow proves nothing and lowers nothing.
//! - **gain** is 1.3: with quinn's 1.25, a burst is paced at 1.6 times the rate, so that a window too small for the link
//!   grows by half with every round trip, and a burst into an idle link is limited by the link. Losses of more than 8%
//!   take from the gain, down to 1, and every sample without them gives a little back: a buffer shorter than the
//!   surplus is overrun for a few bursts and not for ever. Where a burst's *first* packets find a queue, others share
//!   the link, and the gain is 1.6: paced at twice its rate `s` against a flow that fills a link of capacity `C`, a burst
//!   gets `C · 2s / (2s + C)`, which equals `s` at half of the link, where 1.3 would settle at three eighths and lose
//!   ground from there.
//!
//! Losses below that share change nothing, since error correction makes up for them. Idle time changes nothing either.

use std::time::{Duration, Instant};

/// Bytes below which a sample says too little: sixteen packets of the smallest size.
const MIN_SAMPLE_BYTES: u64 = 16 * 1200;
/// Share of lost bytes that is the bottleneck's doing.
const HEAVY_LOSS: f64 = 0.08;
/// Round trips this much longer at a burst's end than at its beginning are a queue of its own making.
const MIN_QUEUE: Duration = Duration::from_millis(2);
const QUEUE_SHARE: f64 = 0.1;
/// A sample offered at least this share of the rate tells what the bottleneck carries.
const OFFERED_SHARE: f64 = 0.8;
/// Window per bandwidth-delay product, alone on the link and beside others.
const GAIN: f64 = 1.3;
const SHARED_GAIN: f64 = 1.6;
/// What heavy losses leave of the gain, once and at least, and what a sample without them gives back.
const BACKOFF: f64 = 0.85;
const MIN_RESTRAINT: f64 = 1.0 / GAIN;
const RECOVERY: f64 = 1.01;
/// The least round trip that the window is made for: on shorter ones both ends' schedulers are what takes time.
const MIN_ROUND_TRIP: Duration = Duration::from_millis(4);
/// How long the least round trip is remembered, at least; twice that at most.
const MEMORY: Duration = Duration::from_secs(10);
/// Least window: two of the pacer's smallest bursts, in packets.
const MIN_WINDOW_PACKETS: u64 = 20;

/// Lost packets below which a share of losses says nothing.
const MIN_LOST_PACKETS: u64 = 6;
/// The most that one sample takes from a rate that was measured: a stalled receiver looks like a slow link for once.
const MAX_FALL: f64 = 0.7;
/// The shortest pause that separates bursts.
const MIN_PAUSE: Duration = Duration::from_millis(5);

/// What is assumed of a path before anything is known of it, and what is never exceeded.
#[derive(Debug, Clone, Copy)]
pub struct BurstConfig {
    /// Window until the first round trip is measured, in bytes.
    pub initial_window: u64,
    /// Rate that is assumed from then on, in bytes per second.
    pub initial_rate: f64,
    /// Most that the assumed rate makes of the window, in bytes.
    pub max_initial_window: u64,
    /// Largest window, in bytes.
    pub max_window: u64,
}

impl Default for BurstConfig {
    /// 100 Mbit/s, and a megabyte on paths so long that it would be more.
    fn default() -> Self {
        Self { initial_window: 250_000, initial_rate: 12.5e6, max_initial_window: 1_000_000, max_window: 32 << 20 }
    }
}

/// A congestion window that measures bursts. Tell it what quinn tells its controllers.
#[derive(Debug, Clone)]
pub struct Burst {
    config: BurstConfig,
    mtu: u64,
    /// Bytes per second.
    rate: f64,
    /// Whether a sample has shown the rate, which is assumed until then.
    measured: bool,
    /// Share of the gain that heavy losses have left.
    restraint: f64,
    /// Round trip at a burst's beginning, smoothed upwards; `None` before the first.
    base: Option<Duration>,
    /// The same of the burst in hand alone.
    first_round_trip: Duration,
    floor: Option<Floor>,
    newest_sent: Option<Instant>,
    sample: Option<Sample>,
    batch: Option<Batch>,
    tally: Tally,
    window: u64,
}

/// Acknowledgements that arrived together.
#[derive(Debug, Clone, Copy)]
struct Batch {
    newest_sent: Instant,
    /// The shortest.
    round_trip: Duration,
    bytes: u64,
}

/// What was acknowledged after a first batch, which is where bytes and time are counted from.
#[derive(Debug, Clone, Copy)]
struct Sample {
    first_sent: Instant,
    first_acked: Instant,
    last_sent: Instant,
    last_acked: Instant,
    bytes: u64,
    /// Of the last batch.
    round_trip: Duration,
}

/// The least round trip of this period and of the one before.
#[derive(Debug, Clone, Copy)]
struct Floor {
    since: Instant,
    current: Duration,
    previous: Duration,
}

/// Bytes since the last sample was closed.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    acked: u64,
    lost: u64,
    marked: bool,
}

impl Burst {
    /// A window for a path of which only the packet size is known.
    pub fn new(config: BurstConfig, mtu: u16) -> Self {
        Self {
            config,
            mtu: mtu.into(),
            rate: config.initial_rate,
            measured: false,
            restraint: 1.0,
            floor: None,
            base: None,
            first_round_trip: Duration::ZERO,
            newest_sent: None,
            sample: None,
            batch: None,
            tally: Tally::default(),
            window: config.initial_window,
        }
    }

    /// Bytes that may be in flight.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// Bytes per second that the path is taken to carry.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// A packet of `bytes`, sent at `sent`, arrived.
    pub fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64) {
        let round_trip = now.saturating_duration_since(sent);
        let pause = (self.base.unwrap_or_default() / 2).max(MIN_PAUSE);
        if self.newest_sent.is_none_or(|newest| sent > newest + pause) {
            self.close();
            self.begin_burst(now, round_trip);
        }
        self.newest_sent = self.newest_sent.max(Some(sent));
        self.tally.acked += bytes;
        let batch = self.batch.get_or_insert(Batch { newest_sent: sent, round_trip, bytes: 0 });
        batch.newest_sent = batch.newest_sent.max(sent);
        batch.round_trip = batch.round_trip.min(round_trip);
        batch.bytes += bytes;
    }

    /// That was the last of the packets acknowledged together; `in_flight` bytes are still out.
    pub fn on_end_acks(&mut self, now: Instant, in_flight: u64) {
        let Some(batch) = self.batch.take() else { return };
        if let Some(sample) = &mut self.sample {
            sample.last_sent = sample.last_sent.max(batch.newest_sent);
            sample.last_acked = now;
            sample.bytes += batch.bytes;
            sample.round_trip = batch.round_trip;
        } else {
            self.sample = Some(Sample {
                first_sent: batch.newest_sent,
                first_acked: now,
                last_sent: batch.newest_sent,
                last_acked: now,
                bytes: 0,
                round_trip: batch.round_trip,
            });
        }
        let full = self.sample.is_some_and(|sample| {
            sample.bytes >= MIN_SAMPLE_BYTES && now - sample.first_acked >= self.base.unwrap_or_default()
        });
        if full || in_flight == 0 {
            self.close();
        }
    }

    /// Packets of `bytes` in total got lost, or arrived with a congestion mark where that is zero. `persistent`: nothing
    /// got through for several round trips, so that what is known of the path no longer holds.
    pub fn on_congestion(&mut self, bytes: u64, persistent: bool) {
        self.tally.lost += bytes;
        self.tally.marked |= bytes == 0;
        if persistent {
            *self =
                Self { window: self.window.min(self.config.initial_window), ..Self::new(self.config, self.mtu as u16) };
        }
    }

    /// The path's packet size changed.
    pub fn on_mtu_update(&mut self, mtu: u16) {
        self.mtu = mtu.into();
    }

    /// Takes in the round trip of a burst's first packet: down at once, up by degrees.
    fn begin_burst(&mut self, now: Instant, round_trip: Duration) {
        self.first_round_trip = round_trip;
        if self.base.is_none() {
            let most = self.config.max_initial_window as f64 / (GAIN * round_trip.as_secs_f64());
            self.rate = self.rate.min(most);
        }
        self.base = Some(match self.base {
            Some(base) if base < round_trip => (3 * base + round_trip) / 4,
            _ => round_trip,
        });
        let floor = self.floor.get_or_insert(Floor { since: now, current: round_trip, previous: round_trip });
        if now.saturating_duration_since(floor.since) > MEMORY {
            *floor = Floor { since: now, current: round_trip, previous: floor.current };
        }
        floor.current = floor.current.min(round_trip);
        self.update_window();
    }

    /// Learns from the sample in hand.
    fn close(&mut self) {
        let Some(sample) = self.sample.take() else { return };
        let acked_time = (sample.last_acked - sample.first_acked).as_secs_f64();
        if sample.bytes < MIN_SAMPLE_BYTES || acked_time == 0.0 {
            return;
        }
        let tally = std::mem::take(&mut self.tally);
        let loss = tally.lost as f64 / (tally.lost + tally.acked) as f64;
        let heavy = loss > HEAVY_LOSS && tally.lost > MIN_LOST_PACKETS * self.mtu;
        let limited = heavy || tally.marked || queues(self.first_round_trip, sample.round_trip);

        let sent_rate = sample.bytes as f64 / (sample.last_sent - sample.first_sent).as_secs_f64();
        let acked_rate = sample.bytes as f64 / acked_time;
        if sent_rate.min(acked_rate) > self.rate {
            self.rate = sent_rate.min(acked_rate);
        } else if limited && sent_rate / (1.0 - loss) >= OFFERED_SHARE * self.rate {
            let least = if self.measured { MAX_FALL * self.rate } else { 0.0 };
            self.rate = acked_rate.clamp(least, self.rate);
        }
        self.measured = true;
        let restraint = self.restraint * if heavy { BACKOFF } else { RECOVERY };
        self.restraint = restraint.clamp(MIN_RESTRAINT, 1.0);
        self.update_window();
    }

    fn update_window(&mut self) {
        let (Some(base), Some(floor)) = (self.base, self.floor) else { return };
        let shared = queues(floor.current.min(floor.previous), base);
        let gain = self.restraint * if shared { SHARED_GAIN } else { GAIN };
        let window = gain * self.rate * base.max(MIN_ROUND_TRIP).as_secs_f64();
        self.window = (window as u64).clamp(MIN_WINDOW_PACKETS * self.mtu, self.config.max_window);
    }
}

/// Whether a round trip of `from` that became one of `to` is a queue.
fn queues(from: Duration, to: Duration) -> bool {
    to.saturating_sub(from) > MIN_QUEUE.max(from.mul_f64(QUEUE_SHARE))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTU: u64 = 1452;
    const ROUND_TRIP: Duration = Duration::from_millis(20);

    /// Sends `packets` at once through a link of `rate` bytes per second; every `lose`-th is lost.
    fn burst(controller: &mut Burst, now: &mut Instant, packets: u32, rate: f64, lose: Option<u32>) {
        let spacing = Duration::from_secs_f64(MTU as f64 / rate);
        let start = *now;
        for packet in 0..packets {
            *now = start + ROUND_TRIP + spacing * packet;
            if lose.is_some_and(|every| packet % every == every - 1) {
                controller.on_congestion(MTU, false);
                continue;
            }
            // Paced at up to 200 Mbit/s, as a window of a bandwidth-delay product and a half would.
            let sent = start + Duration::from_secs_f64(MTU as f64 / 25e6) * packet;
            controller.on_ack(*now, sent, MTU);
            controller.on_end_acks(*now, u64::from(packets - 1 - packet) * MTU);
        }
        *now += Duration::from_millis(100);
    }

    fn settled(rate: f64) -> (Burst, Instant) {
        let (mut controller, mut now) = (Burst::new(BurstConfig::default(), MTU as u16), Instant::now());
        for _ in 0..10 {
            burst(&mut controller, &mut now, 300, rate, None);
        }
        (controller, now)
    }

    #[test]
    fn the_window_is_what_the_link_holds_and_a_little_more() {
        for rate in [5e6, 12.5e6, 20e6] {
            let (controller, _) = settled(rate);
            let product = rate * ROUND_TRIP.as_secs_f64();
            let gain = controller.window() as f64 / product;
            assert!((1.25..1.35).contains(&gain), "{gain} at {rate}");
        }
    }

    #[test]
    fn idle_time_changes_nothing() {
        let (mut controller, mut now) = settled(12.5e6);
        let before = controller.window();
        now += Duration::from_secs(60);
        burst(&mut controller, &mut now, 300, 12.5e6, None);
        assert!(controller.window().abs_diff(before) < before / 20);
    }

    #[test]
    fn scattered_losses_change_nothing() {
        let (mut controller, mut now) = settled(12.5e6);
        let before = controller.window();
        for _ in 0..20 {
            burst(&mut controller, &mut now, 300, 12.5e6, Some(20));
        }
        assert!(controller.window() >= before * 9 / 10, "{} after {before}", controller.window());
    }

    #[test]
    fn heavy_losses_take_the_surplus_and_no_more() {
        let (mut controller, mut now) = settled(12.5e6);
        for _ in 0..20 {
            burst(&mut controller, &mut now, 300, 12.5e6, Some(5));
        }
        let product = 12.5e6 * ROUND_TRIP.as_secs_f64();
        // A fifth of the packets is lost, so that four fifths of the rate arrive.
        assert!((0.75 * product..product).contains(&(controller.window() as f64)), "{}", controller.window());
    }

    #[test]
    fn a_slower_link_is_noticed_within_a_few_bursts() {
        let (mut controller, mut now) = settled(12.5e6);
        for _ in 0..4 {
            burst(&mut controller, &mut now, 300, 2.5e6, None);
        }
        assert!((controller.rate() - 2.5e6).abs() < 0.25e6, "{}", controller.rate());
    }

    #[test]
    fn sparse_packets_lower_nothing() {
        let (mut controller, mut now) = settled(12.5e6);
        let before = controller.window();
        for packet in 0..2000 {
            now += Duration::from_millis(4);
            // Their round trips wander, as beside others' traffic.
            let round_trip = ROUND_TRIP + Duration::from_millis(packet % 7 * 3);
            controller.on_ack(now, now.checked_sub(round_trip).unwrap(), MTU);
            controller.on_end_acks(now, 5 * MTU);
            controller.on_congestion(u64::from(packet % 5 == 0) * MTU * 2 + MTU, false);
        }
        assert!(controller.rate() >= 12e6, "{}", controller.rate());
        assert!(controller.window() >= before * 3 / 4, "{} after {before}", controller.window());
    }

    #[test]
    fn an_outage_starts_from_the_assumptions() {
        let (mut controller, _) = settled(20e6);
        controller.on_congestion(MTU, true);
        assert_eq!(controller.window(), BurstConfig::default().initial_window);
    }
}
