//! A link and the QUIC-like senders on it, in simulated time: what a test of latency runs on, so that no clock decides it.
//!
//! [`Link`] is one direction of a bottleneck. [`World`] joins two of them with any number of flows, each of which paces, acknowledges
//! and detects losses as quinn 0.11 does, under a [`Window`] of the test's choice. Everything random comes from one seed.

mod cubic;
mod link;
mod world;

pub use cubic::Cubic;
pub use link::{Link, Loss, Shape};
pub use world::{End, Event, Fixed, Window, World};

/// A generator of random numbers that always gives the same ones.
pub fn rng(seed: u64) -> fastrand::Rng {
    fastrand::Rng::with_seed(seed)
}

/// The `q`-quantile (0 to 1) of `values`, by the nearest rank.
///
/// # Panics
/// When `values` is empty.
pub fn quantile<T: Copy + Ord>(values: &[T], q: f64) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}
