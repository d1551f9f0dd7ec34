"""Typed errors of the services, and the one place where they become gRPC statuses and stream errors."""

import asyncio
import logging
import secrets
from typing import Any, ClassVar, NoReturn

import grpc
from openpi_flash.v1 import types_pb2

logger = logging.getLogger(__name__)

FIELD_METADATA_KEY = "openpi-error-field-bin"
"""Trailing metadata of a failed unary call: UTF-8 path of the offending field, when there is one."""

_MAX_MESSAGE_LENGTH = 2048  # a status travels in HTTP/2 trailers, which clients cap at 8 KiB


class ServiceError(Exception):
    """What a client is told about a failure. The message is readable on its own and names the field, if any.

    Attributes:
        code: the gRPC status.
        message: what was wrong and what was expected.
        field: path of the offending field, or empty.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidArgumentError(ServiceError):
    """The request cannot be used as it is."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class FailedPreconditionError(ServiceError):
    """The request is fine, but not for a server configured like this one."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class NotFoundError(ServiceError):
    """What the request names does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class ResourceExhaustedError(ServiceError):
    """The server has as much work as it accepts; try again later."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceededError(ServiceError):
    """The request's time ran out."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class RequestCancelledError(ServiceError):
    """The caller gave the request up."""

    code = grpc.StatusCode.CANCELLED


class UnavailableError(ServiceError):
    """The server cannot answer now: starting, stopping, or out of reach."""

    code = grpc.StatusCode.UNAVAILABLE


class UnauthenticatedError(ServiceError):
    """The request carries no valid credentials."""

    code = grpc.StatusCode.UNAUTHENTICATED


class InternalError(ServiceError):
    """A fault of the server. The message holds a reference to the log and nothing else of the inside."""

    code = grpc.StatusCode.INTERNAL


_BY_CODE: dict[grpc.StatusCode, type[ServiceError]] = {kind.code: kind for kind in ServiceError.__subclasses__()}
_CODE_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def to_service_error(error: BaseException) -> ServiceError:
    """A ServiceError as it is; anything else, logged with its traceback, as an InternalError that refers to the log."""
    if isinstance(error, ServiceError):
        return error
    reference = secrets.token_hex(4)
    logger.error("internal error (reference %s)", reference, exc_info=error)
    return InternalError(f"internal error of the server (reference {reference} in its log)")


async def abort(context: grpc.aio.ServicerContext, error: BaseException) -> NoReturn:
    """Ends an RPC with the status of `error`."""
    if isinstance(error, asyncio.CancelledError):
        raise error
    known = to_service_error(error)
    metadata: tuple[tuple[str, Any], ...] = ((FIELD_METADATA_KEY, known.field.encode()),) if known.field else ()
    await context.abort(known.code, known.message[:_MAX_MESSAGE_LENGTH], metadata)
    raise AssertionError("abort returned")


def error_to_proto(error: BaseException) -> types_pb2.Error:
    """The error of one request on a stream."""
    known = to_service_error(error)
    return types_pb2.Error(code=known.code.value[0], message=known.message, field=known.field)


def error_from_proto(error: types_pb2.Error) -> ServiceError:
    """The inverse of error_to_proto; a status that no class stands for becomes an InternalError naming it."""
    return _from_code(_CODE_BY_NUMBER.get(error.code, grpc.StatusCode.UNKNOWN), error.message, error.field)


def from_rpc_error(error: grpc.RpcError) -> ServiceError:
    """The error that another service answered with, from the exception of a failed call (sync or asyncio)."""
    call: Any = error  # grpc's exceptions of calls have code(), details() and trailing_metadata(); RpcError has not
    code = call.code() if hasattr(call, "code") else grpc.StatusCode.UNKNOWN
    details = (call.details() if hasattr(call, "details") else None) or code.name
    trailing = (call.trailing_metadata() if hasattr(call, "trailing_metadata") else None) or ()
    field = next((value for key, value in trailing if key == FIELD_METADATA_KEY), b"")
    return _from_code(code, details, field.decode(errors="replace"))


def _from_code(code: grpc.StatusCode, message: str, field: str) -> ServiceError:
    kind = _BY_CODE.get(code)
    return kind(message, field) if kind else InternalError(f"{code.name}: {message}", field)
