//! One direction of a bottleneck: rate, drop-tail buffer, delay, jitter, loss.

use std::time::{Duration, Instant};

/// What one direction of a link does to packets.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Bytes per second.
    pub rate: f64,
    /// One way, without queueing.
    pub delay: Duration,
    /// Packets that would wait longer than this are dropped.
    pub buffer: Duration,
    /// Up to this much is added to each packet's delay; packets may overtake one another.
    pub jitter: Duration,
    /// Which packets get lost.
    pub loss: Loss,
}

impl Shape {
    /// A link without loss or jitter and with a buffer of 100 ms.
    pub fn new(round_trip: Duration, mbit_per_s: f64) -> Self {
        Self {
            rate: mbit_per_s * 1e6 / 8.0,
            delay: round_trip / 2,
            buffer: Duration::from_millis(100),
            jitter: Duration::ZERO,
            loss: Loss::Random(0.0),
        }
    }
}

/// Which packets get lost, besides those that the buffer has no room for.
#[derive(Debug, Clone, Copy)]
pub enum Loss {
    /// Each with this probability.
    Random(f64),
    /// Each with `probability` during `length` of every `every`; the rest get through.
    Bursts {
        /// From the start of one burst to the start of the next.
        every: Duration,
        /// Of a burst.
        length: Duration,
        /// Of a packet's loss within a burst.
        probability: f64,
    },
}

/// One direction of a link.
#[derive(Debug)]
pub struct Link {
    shape: Shape,
    start: Instant,
    free_at: Instant,
    rng: fastrand::Rng,
    /// Packets for which the buffer had no room.
    pub overflows: u64,
    /// Bytes that have left the bottleneck, lost ones included.
    pub carried: u64,
}

impl Link {
    /// A link that carries nothing yet.
    pub fn new(shape: Shape, start: Instant, seed: u64) -> Self {
        Self { shape, start, free_at: start, rng: fastrand::Rng::with_seed(seed), overflows: 0, carried: 0 }
    }

    /// Changes the link; what it already carries stays as it was.
    pub fn reshape(&mut self, shape: Shape) {
        self.shape = shape;
    }

    /// When a packet of `bytes` sent at `now` arrives, `None` when it is lost.
    pub fn send(&mut self, now: Instant, bytes: usize) -> Option<Instant> {
        let start = self.free_at.max(now);
        if start - now > self.shape.buffer {
            self.overflows += 1;
            return None;
        }
        self.free_at = start + Duration::from_secs_f64(bytes as f64 / self.shape.rate);
        self.carried += bytes as u64;
        let probability = match self.shape.loss {
            Loss::Random(probability) => probability,
            Loss::Bursts { every, length, probability } => {
                let phase = (self.free_at - self.start).as_nanos() % every.as_nanos();
                if phase < length.as_nanos() { probability } else { 0.0 }
            }
        };
        if self.rng.f64() < probability {
            return None;
        }
        Some(self.free_at + self.shape.delay + self.shape.jitter.mul_f64(self.rng.f64()))
    }
}
