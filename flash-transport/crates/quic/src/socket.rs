//! UDP sockets.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

/// Room for a few observations that arrive while the process is off the processor. The kernel gives less where
/// `net.core.rmem_max` says so.
const BUFFER_BYTES: usize = 4 << 20;

/// A UDP socket at `address` with large buffers. On the unspecified IPv6 address it serves IPv4 too.
pub fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // Smaller buffers only cost speed.
    let _ = socket.set_recv_buffer_size(BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(BUFFER_BYTES);
    socket.bind(&address.into())?;
    Ok(socket.into())
}
