//! Congestion control for "one burst of 50 to 500 KB every 20 to 500 ms".
//!
//! A controller for bulk grows its window over many round trips, forgets it when idle, and takes every loss for a full
//! buffer. A robot's observation is over in one or two round trips, follows an idle time, and its losses are mostly the
//! radio's. [`Burst`] therefore measures what the bottleneck carries from every burst's acknowledgements, keeps it
//! across idle times, and heeds what a full buffer does to round trips instead of single losses.
//!
//! [`Burst`] holds the arithmetic and knows nothing of sockets or clocks; [`BurstConfig`] makes it a controller of quinn.

mod burst;
mod quinn_adapter;

pub use burst::{Burst, BurstConfig};
pub use quinn_adapter::rate;
