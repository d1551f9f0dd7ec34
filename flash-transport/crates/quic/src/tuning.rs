//! How QUIC is tuned: for a burst of 50 to 500 KB every 20 to 500 ms that wants to be answered, not for bulk.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use openpi_flash_congestion::BurstConfig;
use quinn::congestion::ControllerFactory;
use quinn::{AckFrequencyConfig, EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};

/// Makes a congestion controller for each connection.
pub type Congestion = Arc<dyn ControllerFactory + Send + Sync>;

/// Round trip assumed before the first is measured. It also sets the pacer's first burst and how soon a lost handshake
/// packet is sent again: 333 ms, which QUIC assumes, costs a second.
const INITIAL_RTT: Duration = Duration::from_millis(25);

/// Longest that a receiver holds an acknowledgement back.
const MAX_ACK_DELAY: Duration = Duration::from_millis(1);

/// Datagrams that wait to be read, in bytes; what is beyond is dropped. A peer can fill it before it is known.
const DATAGRAM_RECEIVE_BUFFER: usize = 2 << 20;

/// Datagrams that wait to be sent, in bytes; what is beyond has to wait. Little, so that messages take turns and one that
/// is given up leaves nothing behind.
pub(crate) const DATAGRAM_SEND_BUFFER: usize = 64 << 10;

/// Largest packet that is taken, in bytes of UDP payload: a jumbo frame's.
pub const MAX_PACKET: u16 = 8972;

/// Largest packet that is tried unless told otherwise: what an Ethernet frame holds behind IPv6. Trying more delays what
/// nearly every path permits.
const ETHERNET_PACKET: u16 = 1452;

/// What of the transport can be set. The defaults are those of a robot's end.
#[derive(Clone)]
pub struct Tuning {
    /// How often an idle connection is probed; none: never.
    pub keep_alive: Option<Duration>,
    /// Silence after which the peer counts as gone. The shorter of the two ends' holds.
    pub idle_timeout: Duration,
    /// Most that a peer may have sent on one stream without its being read, in bytes.
    pub stream_window: u32,
    /// Most that a peer may have sent on all streams without its being read, in bytes.
    pub connection_window: u32,
    /// Most streams at once that the peer may open, in each direction: (bidirectional, unidirectional).
    pub streams: (u32, u32),
    /// Largest packet that is tried, in bytes of UDP payload, up to [`MAX_PACKET`].
    pub max_packet: u16,
    /// How fast to send.
    pub congestion: Congestion,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            keep_alive: Some(Duration::from_millis(300)),
            idle_timeout: Duration::from_secs(1),
            stream_window: 4 << 20,
            connection_window: 8 << 20,
            streams: (0, 0),
            max_packet: ETHERNET_PACKET,
            congestion: Arc::new(BurstConfig::default()),
        }
    }
}

impl fmt::Debug for Tuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tuning")
            .field("keep_alive", &self.keep_alive)
            .field("idle_timeout", &self.idle_timeout)
            .finish_non_exhaustive()
    }
}

impl Tuning {
    /// The same as quinn wants it.
    pub fn transport(&self) -> TransportConfig {
        let mut acks = AckFrequencyConfig::default();
        acks.max_ack_delay(Some(MAX_ACK_DELAY));
        let idle_ms = u32::try_from(self.idle_timeout.as_millis()).unwrap_or(u32::MAX);
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.max_packet);
        let mut config = TransportConfig::default();
        config
            .initial_rtt(INITIAL_RTT)
            .ack_frequency_config(Some(acks))
            .mtu_discovery_config(Some(discovery))
            .keep_alive_interval(self.keep_alive)
            .max_idle_timeout(Some(VarInt::from_u32(idle_ms).into()))
            .stream_receive_window(self.stream_window.into())
            .receive_window(self.connection_window.into())
            .max_concurrent_bidi_streams(self.streams.0.into())
            .max_concurrent_uni_streams(self.streams.1.into())
            .datagram_receive_buffer_size(Some(DATAGRAM_RECEIVE_BUFFER))
            .datagram_send_buffer_size(DATAGRAM_SEND_BUFFER)
            .congestion_controller_factory(Arc::clone(&self.congestion));
        config
    }
}

/// Lets packets of up to [`MAX_PACKET`] in.
pub fn accept_large_packets(config: &mut EndpointConfig) {
    let accepted = config.max_udp_payload_size(MAX_PACKET);
    debug_assert!(accepted.is_ok(), "a size that QUIC permits");
}
