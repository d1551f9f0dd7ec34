//! How many repair symbols to send unasked, from what receivers report.
//!
//! A block of `n` symbols on a line that loses each with probability `p` loses `λ = n·p` of them on average, with a
//! standard deviation of `√λ`. `λ + 3√λ` therefore covers all but about one message in a thousand, where an average
//! with a fixed margin is wasteful for long messages and too little for short ones. Two symbols besides cover the rare
//! loss on a clean line, where λ says nothing yet. Losses in bursts do not follow this: what it did not cover is
//! remembered, as a share of the message and as a run of symbols, and covered from then on, for a while.
//!
//! ```text
//! repairs = 2 + max(λ + 3√λ, share·n, run), at most max(n/4, 4)
//! ```
//!
//! `p` is averaged over some 500 symbols when it rises and over some 4000 when it falls; share rises at once, to 5/4 of
//! what was lost, and run too; they fall by 1% a message. Where losses are random this puts `p` some tenths of a standard deviation too high, which is
//! the side to be wrong on: a repair symbol too many costs bytes, one too few a round trip.

/// Symbols that a clean line gets.
const FLOOR: f64 = 2.0;
/// Losses assumed before anything was reported: what covers a message nearly always on a line that loses 3%.
const INITIAL_LOSS: f64 = 0.02;
const RISE_SYMBOLS: f64 = 500.0;
const FALL_SYMBOLS: f64 = 4000.0;
const BURST_DECAY: f64 = 0.99;
const BURST_MARGIN: f64 = 1.25;
const MOST: f64 = 0.25;

/// Losses of one direction of one path, and what follows from them.
#[derive(Debug, Clone, Copy)]
pub struct Redundancy {
    loss: f64,
    burst_share: f64,
    burst_run: f64,
}

impl Default for Redundancy {
    fn default() -> Self {
        Self { loss: INITIAL_LOSS, burst_share: 0.0, burst_run: 0.0 }
    }
}

impl Redundancy {
    /// Repair symbols for a block of `sources`.
    pub fn repairs(&self, sources: usize) -> usize {
        let sources = sources as f64;
        let wanted = FLOOR + self.random(sources).max(self.burst_share * sources).max(self.burst_run);
        wanted.min((MOST * sources).max(2.0 * FLOOR)).ceil() as usize
    }

    /// Estimated probability that a symbol is lost.
    pub fn loss(&self) -> f64 {
        self.loss
    }

    /// Takes in that `lost` of `sent` symbols got lost, at most `longest_run` in a row.
    pub fn on_report(&mut self, sent: usize, lost: usize, longest_run: usize) {
        if sent == 0 {
            return;
        }
        let (sent, lost) = (sent as f64, lost.min(sent) as f64);
        self.burst_share *= BURST_DECAY;
        self.burst_run *= BURST_DECAY;
        if lost > FLOOR + self.random(sent) {
            self.burst_share = self.burst_share.max(BURST_MARGIN * lost / sent);
        }
        self.burst_run = self.burst_run.max(longest_run as f64);
        let observed = lost / sent;
        let memory = if observed > self.loss { RISE_SYMBOLS } else { FALL_SYMBOLS };
        self.loss += (observed - self.loss) * sent / (sent + memory);
    }

    /// Losses among `symbols` that chance alone accounts for.
    fn random(&self, symbols: f64) -> f64 {
        let mean = self.loss * symbols;
        mean + 3.0 * mean.sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: usize = 323;

    /// Repairs on average, and messages in 1000 that they did not cover, at random losses of `loss`.
    fn simulate(loss: f64) -> (f64, usize) {
        let mut redundancy = Redundancy::default();
        let mut rng = openpi_flash_linksim::rng(7);
        let (mut repairs, mut uncovered) = (0, 0);
        for message in 0..1200 {
            let sent = SOURCES + redundancy.repairs(SOURCES);
            let missing = (0..sent).filter(|_| rng.f64() < loss).count();
            redundancy.on_report(sent, missing, 1);
            if message >= 200 {
                repairs += sent - SOURCES;
                uncovered += usize::from(missing > sent - SOURCES);
            }
        }
        (repairs as f64 / 1000.0, uncovered)
    }

    #[test]
    fn a_clean_line_costs_next_to_nothing() {
        let (repairs, uncovered) = simulate(0.0);
        assert!(repairs <= 3.0, "{repairs}");
        assert_eq!(uncovered, 0);
    }

    #[test]
    fn random_losses_are_covered_at_their_price() {
        for (loss, most) in [(0.01, 17.0), (0.03, 32.0)] {
            let (repairs, uncovered) = simulate(loss);
            assert!(repairs <= most, "{repairs} at {loss}");
            assert!(uncovered <= 3, "{uncovered} at {loss}");
        }
    }

    #[test]
    fn a_burst_is_covered_from_the_next_message_on() {
        let mut redundancy = Redundancy::default();
        redundancy.on_report(340, 50, 12);
        assert!(redundancy.repairs(SOURCES) >= 48);
        for _ in 0..600 {
            redundancy.on_report(340, 0, 0);
        }
        assert!(redundancy.repairs(SOURCES) <= 3);
    }

    #[test]
    fn no_report_asks_for_more_than_a_quarter() {
        let mut redundancy = Redundancy::default();
        redundancy.on_report(100, 100, 100);
        assert_eq!(redundancy.repairs(400), 100);
        assert_eq!(redundancy.repairs(3), 4);
        redundancy.on_report(0, 5, 5);
        assert!(redundancy.loss().is_finite());
    }
}
