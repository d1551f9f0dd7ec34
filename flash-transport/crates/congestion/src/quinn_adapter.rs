//! [`Burst`] as quinn's congestion controller.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory};

use crate::{Burst, BurstConfig};

impl ControllerFactory for BurstConfig {
    fn build(self: Arc<Self>, _now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(BurstController { initial_window: self.initial_window, burst: Burst::new(*self, current_mtu) })
    }
}

/// Bytes per second that a connection takes its path to carry; none with another controller.
pub fn rate(state: Box<dyn Controller>) -> Option<f64> {
    Some(state.into_any().downcast::<BurstController>().ok()?.burst.rate())
}

#[derive(Debug, Clone)]
struct BurstController {
    initial_window: u64,
    burst: Burst,
}

impl Controller for BurstController {
    /// Round trips are taken from the packets: quinn's estimate starts from the configured one, and its least value is
    /// that of the whole connection.
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool, _rtt: &RttEstimator) {
        self.burst.on_ack(now, sent, bytes);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        _app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.burst.on_end_acks(now, in_flight);
    }

    fn on_congestion_event(&mut self, _now: Instant, _sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        self.burst.on_congestion(lost_bytes, is_persistent_congestion);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.burst.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.burst.window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.initial_window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
