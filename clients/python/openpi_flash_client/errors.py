"""What can go wrong with a request, as exceptions."""

from typing import Any

import grpc

_FIELD_METADATA_KEY = "openpi-error-field-bin"  # trailing metadata in which the server names the offending field


class PolicyError(Exception):
    """A request failed.

    Attributes:
        message: what was wrong and what was expected.
        code: gRPC status name, e.g. `INVALID_ARGUMENT`.
        field: path of the offending entry, or empty.
    """

    code = "UNKNOWN"

    def __init__(self, message: str, *, field: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.code = code or type(self).code


class InvalidArgumentError(PolicyError, ValueError):
    """The observation or an option cannot be used as it is."""

    code = "INVALID_ARGUMENT"


class FailedPreconditionError(PolicyError):
    """The request is fine, but not for a server configured like this one."""

    code = "FAILED_PRECONDITION"


class PolicyTimeoutError(PolicyError, TimeoutError):
    """No answer in time."""

    code = "DEADLINE_EXCEEDED"


class ServerBusyError(PolicyError):
    """The server has as much work as it accepts, or the message is larger than it accepts."""

    code = "RESOURCE_EXHAUSTED"


class UnavailableError(PolicyError, ConnectionError):
    """The server is starting, stopping, or out of reach."""

    code = "UNAVAILABLE"


class AuthenticationError(PolicyError, PermissionError):
    """The server does not accept the token, or one end does not trust the other's certificate."""

    code = "UNAUTHENTICATED"


_BY_CODE: dict[str, type[PolicyError]] = {kind.code: kind for kind in PolicyError.__subclasses__()}
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


def from_status(code: int, message: str, field: str = "") -> PolicyError:
    """The exception for a gRPC status number."""
    name = _NAMES.get(code, "UNKNOWN")
    return _BY_CODE.get(name, PolicyError)(message, field=field, code=name)


def closed_error() -> PolicyError:
    """The exception for a call of a policy that has been closed."""
    return PolicyError("the policy is closed", code="CANCELLED")


def from_rpc_error(error: grpc.RpcError) -> PolicyError:
    """The exception for a failed gRPC call."""
    call: Any = error  # what gRPC raises is the call, too
    field = next((value for key, value in call.trailing_metadata() or () if key == _FIELD_METADATA_KEY), b"")
    return from_status(call.code().value[0], call.details() or call.code().name, field.decode(errors="replace"))
