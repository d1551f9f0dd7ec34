"""openpi's msgpack: its own bytes in both directions, and what a hostile peer may send."""

import json
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from openpi_flash_common import openpi_msgpack
from openpi_flash_common.errors import InvalidArgumentError

_GOLDEN = json.loads((Path(__file__).parents[3] / "tests/data/golden/transforms/msgpack.json").read_text())
_SAMPLES = {name: sample for name, sample in _GOLDEN.items() if not name.startswith("__")}


@pytest.mark.parametrize("name", _SAMPLES)
def test_golden_bytes_decode_to_what_openpi_packed_and_encode_back(name):
    sample = _SAMPLES[name]
    value = openpi_msgpack.unpackb(bytes.fromhex(sample["hex"]))
    _check(value, sample["describe"])
    assert openpi_msgpack.packb(value).hex() == sample["hex"]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("fortran", np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3))),
        ("strided", np.arange(12, dtype=np.int32)[::3]),
        ("np_float64", np.float64(1.25)),
        ("np_str", np.str_("hey")),
    ],
)
def test_what_decoding_does_not_keep_encodes_to_golden_bytes(name, array):
    assert openpi_msgpack.packb(array).hex() == _SAMPLES[name]["hex"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("object", np.array([{}], dtype=object)),
        ("complex", np.zeros(2, np.complex128)),
        ("complex_scalar", np.complex64(1)),
        ("structured", np.zeros(2, [("a", "<i4")])),
    ],
)
def test_dtypes_that_openpi_rejects_are_rejected(name, value):
    assert _GOLDEN["__rejected__"][name].startswith("ValueError")
    with pytest.raises(ValueError, match="cannot pack dtype"):
        openpi_msgpack.packb({"x": value})


def test_other_values_are_rejected():
    with pytest.raises(TypeError, match="cannot pack a set"):
        openpi_msgpack.packb({"x": {1}})


def test_arrays_are_read_only():
    array = openpi_msgpack.unpackb(openpi_msgpack.packb(np.zeros(3)))
    assert not array.flags.writeable


def _ndarray(**changes: Any) -> dict[bytes, Any]:
    entry = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    return {key: value for key, value in (entry | {k.encode(): v for k, v in changes.items()}).items() if value != "-"}


def _scalar(data: Any, dtype: str) -> dict[bytes, Any]:
    return {b"__npgeneric__": True, b"data": data, b"dtype": dtype}


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (_ndarray(shape=[3]), r"8 bytes of data; shape \[3\] of <f4 needs exactly 12"),
        (_ndarray(shape=[1 << 62, 1 << 62]), "needs exactly"),
        (_ndarray(shape=[-2]), "none negative"),
        (_ndarray(shape=[True, 2]), "whole numbers"),
        (_ndarray(shape=2), "shape must be a list"),
        (_ndarray(shape=[1] * 33), "at most 32"),
        (_ndarray(data=b"", shape=[0, 1 << 62, 1 << 62]), "too large"),
        (_ndarray(data="text"), "data is a str"),
        (_ndarray(dtype="|O"), "dtype '|O' is not one of"),
        (_ndarray(dtype="O"), "is not one of"),
        (_ndarray(dtype="<c8"), "is not one of"),
        (_ndarray(dtype="<f4,<f4"), "is not one of"),
        (_ndarray(dtype="(2,)f4"), "is not one of"),
        (_ndarray(dtype="<M8[ns]"), "is not one of"),
        (_ndarray(dtype=b"<f4"), "is not one of"),
        (_ndarray(dtype="<U0", data=b"", shape=[1 << 40]), "needs exactly 0"),
        (_ndarray(dtype="<U2", data=b"\xff" * 8, shape=[]), "beyond Unicode"),
        (_ndarray(dtype="|b1", data=b"\x02" * 2), "neither 0 nor 1"),
        (_ndarray(dtype="-"), "exactly __ndarray__ = true"),
        (_ndarray(extra=1), "exactly __ndarray__ = true"),
        (_scalar(300, "|u1"), "300 does not fit"),
        (_scalar(1e300, "<f4"), "does not fit"),
        (_scalar("x", "<f4"), "cannot be a str"),
        (_scalar(True, "<i8"), "cannot be a bool"),
        ({b"other": 1}, "is not a string"),
        (msgpack.Timestamp(1), "ext"),
    ],
)
def test_an_entry_that_contradicts_itself_is_refused_by_its_path(entry, problem):
    data = msgpack.packb({"observation": {"state": entry}})
    with pytest.raises(InvalidArgumentError, match=problem) as caught:
        openpi_msgpack.unpackb(data)
    if problem != "ext":  # refused by the unpacker, which knows no paths
        assert caught.value.field == "observation/state"
        assert str(caught.value).startswith("observation/state: ")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "incomplete"),
        (bytes.fromhex(_SAMPLES["droid_obs"]["hex"])[:-3], "incomplete"),
        (b"\x80\x80", "1 bytes after the end"),
        (b"\xc1", "starts no value"),
        (b"\x81\xa1\xff\x01", "not UTF-8"),
        (b"\x82\xa1a\x01\xa1a\x02", "same key twice"),
        (b"\x81\x01\x02", "not allowed for map key"),
        (b"\x91" * 17 + b"\x01", "inside each other"),
        (b"\x91" * 2000 + b"\x01", "inside each other"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "incomplete|exceeds"),
        (b"\xdc\x10\x00" + (b"\xdc\x00\x10" + b"\x80" * 16) * 4096, "more than 65536"),
    ],
)
def test_bytes_that_are_not_one_message_are_refused(data, problem):
    with pytest.raises(InvalidArgumentError, match=problem):
        openpi_msgpack.unpackb(data)


def test_damaged_messages_never_raise_anything_else():
    rng = np.random.default_rng(7)
    original = bytes.fromhex(_SAMPLES["droid_obs"]["hex"])
    refused = 0
    for _ in range(5000):
        damaged = bytearray(original)
        for _ in range(rng.integers(1, 5)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        try:
            openpi_msgpack.unpackb(bytes(damaged[: rng.integers(1, len(damaged) + 1)]))
        except InvalidArgumentError:
            refused += 1
    assert refused > 2500


def _check(value: Any, description: Any) -> None:
    if isinstance(description, dict) and "ndarray" in description:
        assert isinstance(value, np.ndarray)
        assert (value.dtype.str, list(value.shape)) == (description["dtype"], description["shape"])
        elements = [str(x) if value.dtype.kind == "f" else repr(x) for x in value.ravel().tolist()]
        assert elements == [str(x) for x in description["ndarray"]]
    elif isinstance(description, dict) and "npgeneric" in description:
        # np.float64 travels as a plain float, so only its value comes back.
        assert np.asarray(value).dtype.str == description["dtype"]
        assert repr(np.asarray(value).item()) == description["npgeneric"]
        assert isinstance(value, np.generic | float | str)
    elif isinstance(description, dict) and "bytes" in description:
        assert value == bytes.fromhex(description["bytes"])
    elif isinstance(description, dict):
        assert list(value) == list(description)
        for key, inner in description.items():
            _check(value[key], inner)
    else:
        assert value == description
        assert type(value) is type(description)
