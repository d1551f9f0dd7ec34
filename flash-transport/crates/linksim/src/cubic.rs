//! The congestion window of a TCP sender, as the traffic to compete with: slow start, then RFC 9438.

use std::time::Instant;

use crate::world::Window;

const SEGMENT: f64 = 1448.0;
const SCALE: f64 = 0.4;
const BETA: f64 = 0.7;

/// A cubic window without fast convergence.
#[derive(Debug)]
pub struct Cubic {
    window: f64,
    threshold: f64,
    largest: f64,
    epoch: Option<Instant>,
    recovery_start: Option<Instant>,
}

impl Default for Cubic {
    fn default() -> Self {
        Self { window: 10.0 * SEGMENT, threshold: f64::INFINITY, largest: 0.0, epoch: None, recovery_start: None }
    }
}

impl Window for Cubic {
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: usize) {
        if self.recovery_start.is_some_and(|start| sent <= start) {
            return;
        }
        if self.window < self.threshold {
            self.window += bytes as f64;
            return;
        }
        let rtt = now - sent;
        let epoch = *self.epoch.get_or_insert(now);
        let target = if self.largest == 0.0 {
            self.window
        } else {
            let time = (now + rtt - epoch).as_secs_f64() - (self.largest * (1.0 - BETA) / SEGMENT / SCALE).cbrt();
            self.largest + SCALE * time.powi(3) * SEGMENT
        };
        // RFC 9438 section 4.3: never slower than Reno with the same backoff.
        let reno = SEGMENT * 3.0 * (1.0 - BETA) / (1.0 + BETA);
        let step = (target - self.window).clamp(reno, 0.5 * self.window);
        self.window += step * bytes as f64 / self.window;
    }

    fn on_lost(&mut self, now: Instant, sent: Instant, persistent: bool, _bytes: usize) {
        if self.recovery_start.is_some_and(|start| sent <= start) {
            return;
        }
        self.recovery_start = Some(now);
        self.largest = self.window;
        self.window = if persistent { 2.0 * SEGMENT } else { (self.window * BETA).max(2.0 * SEGMENT) };
        self.threshold = self.window;
        self.epoch = None;
    }

    fn window(&self) -> u64 {
        self.window as u64
    }
}
