"""Python client of openpi-flash for robots."""

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

__all__ = [
    "AuthenticationError",
    "FailedPreconditionError",
    "GrpcPolicy",
    "InvalidArgumentError",
    "PolicyError",
    "PolicyTimeoutError",
    "ServerBusyError",
    "UnavailableError",
]
