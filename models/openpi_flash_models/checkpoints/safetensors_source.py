"""Reads openpi's PyTorch weights from safetensors files, memory-mapped: a tensor costs memory only while it is read."""

import contextlib
import json
import math
import mmap
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from openpi_flash_models.checkpoints.layout import TORCH_EMBEDDING, TORCH_EXPERT, TORCH_ROOT, TORCH_VLM
from openpi_flash_models.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
FILE_NAME = "model.safetensors"

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
}
"""Element types by their name in the file's header. Weights are floats; the others may occur in tensors not needed."""

_MAX_HEADER_BYTES = 64 << 20
TIED_EMBEDDING = TORCH_VLM + "embed_tokens.weight"
_JUNK_HEAD = TORCH_ROOT + "gemma_expert.lm_head.weight"
_PLAIN_EXPERT_NORM = re.compile(
    re.escape(TORCH_EXPERT) + r"(layers\.\d+\.(input|post_attention)_layernorm|norm)\.weight"
)
_TIME_MLP = re.compile(r"(?:action_)?(time_mlp_(?:in|out)\.(?:weight|bias))")


def open_torch_source(path: Path) -> "SafetensorsSource":
    """Opens a safetensors file, or a directory with `model.safetensors` or its sharded index.

    Names are made canonical: LeRobot's `model.` prefix goes, its `time_mlp_*` of a pi0 model become
    `action_time_mlp_*`, the embedding is found under either of its two names, and what openpi and LeRobot are known to
    store without using (the action expert's head, a pi0.5 model's `state_proj` and plain expert norms) is left out.

    Raises:
        CheckpointError: no such file, or it is truncated or corrupt.
    """
    if path.is_dir():
        index = path / INDEX_NAME
        files = [path / FILE_NAME] if (path / FILE_NAME).is_file() or not index.is_file() else _shards(index)
    else:
        files = [path]
    maps: list[mmap.mmap] = []
    entries: dict[str, _Entry] = {}
    try:
        for file in files:
            mapped, found = _open_file(file)
            maps.append(mapped)
            entries |= found
        return SafetensorsSource(path, maps, _canonical(entries))
    except BaseException:
        for mapped in maps:
            mapped.close()
        raise


class SafetensorsSource:
    """A `TensorSource` over mapped files. `names()` runs from the largest tensor to the smallest: a loader that copies
    and releases in this order never has a large source tensor beside a nearly complete copy of the model."""

    def __init__(self, path: Path, maps: list[mmap.mmap], entries: dict[str, "_Entry"]) -> None:
        self.path = path
        self._maps = maps
        self._entries = entries

    def names(self) -> Iterable[str]:
        return sorted(self._entries, key=lambda name: self._entries[name].num_bytes, reverse=True)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._entry(name).dtype

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file."""
        entry = self._entry(name)
        flat = np.frombuffer(entry.mapped, entry.dtype, count=math.prod(entry.shape), offset=entry.offset)
        return flat.reshape(entry.shape)

    def release(self, name: str) -> None:
        """Drops the tensor's pages from this process; a later `read` takes them from the file again."""
        entry = self._entry(name)
        start = entry.offset - entry.offset % mmap.PAGESIZE
        entry.mapped.madvise(mmap.MADV_DONTNEED, start, entry.offset + entry.num_bytes - start)

    def close(self) -> None:
        """Unmaps the files; where arrays from `read` are still alive, the last of them does."""
        self._entries = {}
        for mapped in self._maps:
            with contextlib.suppress(BufferError):
                mapped.close()
        self._maps = []

    def _entry(self, name: str) -> "_Entry":
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {name}") from None


class _Entry(NamedTuple):
    mapped: mmap.mmap
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not the name of a file beside it")
    return [index.parent / name for name in names]


def _open_file(path: Path) -> tuple[mmap.mmap, dict[str, _Entry]]:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 8:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
            (header_len,) = struct.unpack("<Q", file.read(8))
            if header_len > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or truncated: its header claims {header_len} bytes, the file has "
                    f"{size} and a header at most {_MAX_HEADER_BYTES}"
                )
            header = json.loads(file.read(header_len))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not JSON: {error}") from error
    try:
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
        header.pop("__metadata__", None)
        return mapped, {name: _entry(path, name, info, mapped, 8 + header_len) for name, info in header.items()}
    except BaseException:
        mapped.close()
        raise


def _entry(path: Path, name: str, info: Any, mapped: mmap.mmap, data_start: int) -> _Entry:
    try:
        dtype_name, shape, (start, stop) = str(info["dtype"]), tuple(info["shape"]), info["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {name}: malformed header entry {str(info)[:200]}") from error
    if dtype_name not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"{path}: {name}: element type {dtype_name}, which is none of {', '.join(SAFETENSORS_DTYPES)}"
        )
    dtype = SAFETENSORS_DTYPES[dtype_name]
    numbers = (*shape, start, stop)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: {name}: shape and offsets must be non-negative integers, not {numbers}")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path}: {name}: {stop - start} bytes do not hold shape {shape} of {dtype_name}")
    if data_start + stop > len(mapped):
        raise CheckpointError(
            f"{path}: truncated: {name} ends at byte {data_start + stop}, the file has {len(mapped)}; fetch it again"
        )
    return _Entry(mapped, dtype, shape, data_start + start, stop - start)


def _canonical(entries: dict[str, _Entry]) -> dict[str, _Entry]:
    entries = {name.removeprefix("model."): entry for name, entry in entries.items()}
    embedding = entries.pop(TIED_EMBEDDING, None)
    if embedding is not None:
        entries.setdefault(TORCH_EMBEDDING, embedding)
    entries.pop(_JUNK_HEAD, None)
    adaptive = any(name.startswith(TORCH_EXPERT) and name.endswith(".dense.weight") for name in entries)
    canonical = {}
    for name, entry in entries.items():
        if adaptive and (name.startswith("state_proj.") or _PLAIN_EXPERT_NORM.fullmatch(name)):
            continue
        if match := _TIME_MLP.fullmatch(name):
            name = match[1] if adaptive else f"action_{match[1]}"  # noqa: PLW2901
        canonical[name] = entry
    return canonical
