//! The server end of the QUIC transport: requests come in over QUIC and go to the gateway's `PolicyService` over gRPC,
//! their bodies untouched.
//!
//! [`Edge::bind`] opens the sockets, [`Edge::serve`] answers until it is told to stop and then drains.

mod connection;
mod identity;
mod limits;
mod metrics;
mod request;
mod server;
mod settings;
mod stranger;
mod upstream;

pub use identity::Identity;
pub use limits::Limits;
pub use metrics::Metrics;
pub use server::Edge;
pub use settings::{EdgeError, EndpointSettings, Settings, Timeouts, Tokens, UpstreamSettings};
