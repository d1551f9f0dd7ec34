"""The connection to a server: address, TLS, token, and how fast a lost connection is noticed and made anew."""

import ipaddress
from pathlib import Path

import grpc

_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", -1),  # how much is too much, the server knows
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own for each policy
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),  # a server that came back at another address is found soon
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
)


def open_channel(
    host: str,
    port: int,
    *,
    unix_socket: str | Path | None,
    ca_file: str | Path | None,
    client_cert_file: str | Path | None,
    client_key_file: str | Path | None,
    insecure_plaintext: bool,
) -> tuple[grpc.Channel, str]:
    """A channel, which connects by itself, and its address for messages.

    Raises:
        ValueError: options that contradict each other.
        OSError: a certificate or key cannot be read.
    """
    if (client_cert_file is None) != (client_key_file is None):
        raise ValueError("client_cert_file and client_key_file go together")
    secured = ca_file is not None or client_cert_file is not None
    if secured and (insecure_plaintext or unix_socket is not None):
        raise ValueError("certificates are of no use with insecure_plaintext or unix_socket: those are plain text")
    if unix_socket is not None:
        address = f"unix:{unix_socket}"
        # gRPC would name the socket's path, which servers in Rust, as the sidecar, refuse as no name of a host.
        return grpc.insecure_channel(address, (*_OPTIONS, ("grpc.default_authority", "localhost"))), address
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    options = (*_OPTIONS, ("grpc.enable_http_proxy", 0)) if _is_loopback(host) else _OPTIONS
    if insecure_plaintext or (_is_loopback(host) and not secured):
        return grpc.insecure_channel(address, options), address
    credentials = grpc.ssl_channel_credentials(
        root_certificates=Path(ca_file).read_bytes() if ca_file is not None else None,
        private_key=Path(client_key_file).read_bytes() if client_key_file is not None else None,
        certificate_chain=Path(client_cert_file).read_bytes() if client_cert_file is not None else None,
    )
    return grpc.secure_channel(address, credentials, options), address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
