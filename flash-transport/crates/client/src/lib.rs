//! The robot's end of the QUIC transport.
//!
//! A [`Client`] is made once. It stays connected, and connects again by itself after a restart of the server, a dead
//! link or a change of address; a request that a lost connection left without an answer is sent once more within its
//! deadline.

mod client;
mod error;
mod link;

pub use client::{Answer, Call, Client, Options};
pub use error::Error;
pub use openpi_flash_quic::Tuning;
pub use openpi_flash_quic::tls::{Certified, Fingerprint, Trust};
pub use openpi_flash_wire::{Code, Method, Refusal};
