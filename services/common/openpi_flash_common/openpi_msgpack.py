"""openpi's msgpack encoding of nested maps, numpy arrays and scalars: its format byte for byte, read with suspicion.

An array is a map with the byte-string keys `__ndarray__` (true), `data` (C order), `dtype` (numpy's string, `<f4`) and
`shape`; a numpy scalar is `__npgeneric__` (true), `data` (a native value) and `dtype`. All other keys are strings.
"""

import functools
import math
import re
from typing import Any

import msgpack
import numpy as np

from openpi_flash_common.errors import InvalidArgumentError

MAX_DEPTH = 16
"""Most maps and lists inside each other."""
MAX_ENTRIES = 1 << 16
"""Most map entries and list elements of a message, all together; larger things are arrays."""

# The unpacker reserves a list's declared length before reading it, 1024 lists deep at most: with this cap 32 MiB.
_MAX_LIST_LENGTH = 4096
_MAX_MAP_LENGTH = 1024
_MAX_RANK = 32
_MAX_CODE_POINT = 0x10FFFF

_DTYPE_STRING = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|[US][0-9]{1,6})", re.ASCII)
_DTYPE_NAME = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)", re.ASCII)
_ARRAY_KEYS = {b"__ndarray__", b"data", b"dtype", b"shape"}
_SCALAR_KEYS = {b"__npgeneric__", b"data", b"dtype"}
_SCALAR_TYPES: dict[str, tuple[type, ...]] = {
    "b": (bool,),
    "i": (int,),
    "u": (int,),
    "f": (float, int),
    "U": (str,),
    "S": (bytes,),
}


def packb(value: Any) -> bytes:
    """Packs nested maps, lists, native values, numpy arrays and scalars as openpi does.

    Raises:
        ValueError: an array or scalar whose dtype is not bool, integer, float, str or bytes.
        TypeError: a value of another kind.
    """
    return msgpack.packb(value, default=_pack_numpy)


def unpackb(data: bytes) -> Any:
    """Unpacks one message from an untrusted peer. Arrays are read-only views of the unpacked bytes.

    Raises:
        InvalidArgumentError: the bytes are not exactly one well-formed message within the limits above, or an array in
            it contradicts itself; the message names the path.
    """
    budget = _Budget()
    try:
        tree = msgpack.unpackb(
            data,
            object_pairs_hook=budget.map,
            list_hook=budget.list,
            max_array_len=_MAX_LIST_LENGTH,
            max_map_len=_MAX_MAP_LENGTH,
            max_ext_len=0,
            strict_map_key=True,
        )
    except msgpack.ExtraData as error:
        raise InvalidArgumentError(f"msgpack: {len(error.extra)} bytes after the end of the message") from error
    except msgpack.FormatError as error:
        raise InvalidArgumentError("msgpack: a byte that starts no value") from error
    except msgpack.StackError as error:
        raise InvalidArgumentError(f"msgpack: more than {MAX_DEPTH} maps and lists inside each other") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError("msgpack: a string that is not UTF-8") from error
    except ValueError as error:  # truncated, or a length beyond a limit
        raise InvalidArgumentError(f"msgpack: {error}") from error
    return _convert(tree, (), MAX_DEPTH)


class _Budget:
    """Counts entries while a message is unpacked, so that many small maps cannot become much memory."""

    def __init__(self) -> None:
        self.left = MAX_ENTRIES

    def map(self, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        self._spend(len(pairs))
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a map with the same key twice")
        return entries

    def list(self, elements: list[Any]) -> list[Any]:
        self._spend(len(elements))
        return elements

    def _spend(self, count: int) -> None:
        self.left -= count + 1
        if self.left < 0:
            raise ValueError(f"more than {MAX_ENTRIES} map entries and list elements")


def _convert(node: Any, path: tuple[str, ...], depth: int) -> Any:
    if isinstance(node, dict | list) and depth == 0:
        raise _error(path, f"more than {MAX_DEPTH} maps and lists inside each other")
    if isinstance(node, dict):
        if b"__ndarray__" in node:
            return _array(node, path)
        if b"__npgeneric__" in node:
            return _scalar(node, path)
        for key in node:
            if not isinstance(key, str):
                raise _error(path, f"key {key!r} is not a string")
        return {key: _convert(value, (*path, key), depth - 1) for key, value in node.items()}
    if isinstance(node, list):
        return [_convert(value, (*path, str(i)), depth - 1) for i, value in enumerate(node)]
    if node is None or isinstance(node, bool | int | float | str | bytes):
        return node
    raise _error(path, "an extension type; maps, lists, numbers, strings and arrays are expected")


def _array(node: dict[Any, Any], path: tuple[str, ...]) -> np.ndarray:
    if node.keys() != _ARRAY_KEYS or node[b"__ndarray__"] is not True:
        raise _error(path, "an array is a map of exactly __ndarray__ = true, data, dtype and shape")
    data, shape = node[b"data"], node[b"shape"]
    dtype = _dtype(node[b"dtype"], path)
    if not isinstance(data, bytes):
        raise _error(path, f"data is a {type(data).__name__}; bytes are expected")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(type(n) is int and n >= 0 for n in shape):
        raise _error(path, f"shape must be a list of at most {_MAX_RANK} whole numbers, none negative")
    count = math.prod(shape)  # Python integers: no overflow
    if len(data) != count * dtype.itemsize or (not dtype.itemsize and count > 1):
        raise _error(
            path, f"{len(data)} bytes of data; shape {shape} of {dtype.str} needs exactly {count * dtype.itemsize}"
        )
    if dtype.kind == "b" and data.strip(b"\x00\x01"):
        raise _error(path, "a bool that is neither 0 nor 1")
    if dtype.kind == "U" and data and np.frombuffer(data, dtype.byteorder + "u4").max() > _MAX_CODE_POINT:
        raise _error(path, "text with a code point beyond Unicode")
    try:
        return np.ndarray(shape, dtype, data)
    except ValueError as error:  # no elements, but axes whose product overflows
        raise _error(path, f"shape {shape} is too large") from error


def _scalar(node: dict[Any, Any], path: tuple[str, ...]) -> Any:
    if node.keys() != _SCALAR_KEYS or node[b"__npgeneric__"] is not True:
        raise _error(path, "a numpy scalar is a map of exactly __npgeneric__ = true, data and dtype")
    value, dtype = node[b"data"], _dtype(node[b"dtype"], path)
    if type(value) not in _SCALAR_TYPES[dtype.kind]:
        raise _error(path, f"a scalar of {dtype.str} cannot be a {type(value).__name__}")
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
        raise _error(path, f"{value} does not fit {dtype.str}")
    with np.errstate(over="ignore"):
        scalar = dtype.type(value)
    if dtype.kind == "f" and np.isinf(scalar) and not math.isinf(value):
        raise _error(path, f"{value} does not fit {dtype.str}")
    return scalar


def _dtype(text: Any, path: tuple[str, ...]) -> np.dtype:
    dtype = _known_dtype(text) if isinstance(text, str) else None
    if dtype is None:
        raise _error(path, f"dtype {text!r} is not one of bool, (u)int8 to 64, float16 to 64, str and bytes")
    return dtype


@functools.lru_cache(maxsize=256)
def _known_dtype(text: str) -> np.dtype | None:
    return np.dtype(text) if _DTYPE_STRING.fullmatch(text) or _DTYPE_NAME.fullmatch(text) else None


def _error(path: tuple[str, ...], problem: str) -> InvalidArgumentError:
    field = "/".join(path)
    return InvalidArgumentError(f"{field or 'message'}: {problem}", field)


def _pack_numpy(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"cannot pack a {type(value).__name__}")
    if not _DTYPE_STRING.fullmatch(value.dtype.str):
        raise ValueError(f"cannot pack dtype {value.dtype}")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
