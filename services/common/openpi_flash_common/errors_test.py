"""Typed errors survive the way to a client and back."""

import grpc
import pytest
from openpi_flash.v1 import types_pb2

from openpi_flash_common.errors import (
    InternalError,
    InvalidArgumentError,
    ServiceError,
    error_from_proto,
    error_to_proto,
    to_service_error,
)


@pytest.mark.parametrize("kind", ServiceError.__subclasses__())
def test_every_kind_survives_a_stream(kind):
    back = error_from_proto(types_pb2.Error.FromString(error_to_proto(kind("wrong é", "a/b")).SerializeToString()))
    assert type(back) is kind
    assert (back.message, back.field) == ("wrong é", "a/b")


def test_kinds_have_statuses_of_their_own():
    codes = [kind.code for kind in ServiceError.__subclasses__()]
    assert len(set(codes)) == len(codes)
    assert grpc.StatusCode.UNKNOWN not in codes


@pytest.mark.parametrize("code", [2, 12, 999])
def test_statuses_without_a_kind_are_internal(code):
    back = error_from_proto(types_pb2.Error(code=code, message="why"))
    assert type(back) is InternalError
    assert "why" in back.message


def test_only_typed_errors_speak_to_clients(caplog):
    typed = InvalidArgumentError("state: wrong", "state")
    assert to_service_error(typed) is typed
    internal = to_service_error(KeyError("password"))
    assert isinstance(internal, InternalError)
    assert "password" not in internal.message
    assert "password" in caplog.text
