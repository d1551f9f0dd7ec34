"""Python client of openpi-flash for robots.

`FlashTransportPolicy` needs the extra `quic`, the package openpi-flash-transport; the rest does not.
"""

from typing import TYPE_CHECKING, Any

from openpi_flash_client.errors import (
    AuthenticationError,
    FailedPreconditionError,
    InvalidArgumentError,
    PolicyError,
    PolicyTimeoutError,
    ServerBusyError,
    UnavailableError,
)
from openpi_flash_client.policy import GrpcPolicy
from openpi_flash_client.realtime import RealTimePolicy

if TYPE_CHECKING:
    from openpi_flash_client.quic import FlashTransportPolicy as FlashTransportPolicy

__all__ = [
    "AuthenticationError",
    "FailedPreconditionError",
    "GrpcPolicy",
    "InvalidArgumentError",
    "PolicyError",
    "PolicyTimeoutError",
    "RealTimePolicy",
    "ServerBusyError",
    "UnavailableError",
]


def __getattr__(name: str) -> Any:
    if name == "FlashTransportPolicy":
        from openpi_flash_client.quic import FlashTransportPolicy

        return FlashTransportPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
