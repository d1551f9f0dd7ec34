"""Writes checkpoints in either layout, a block of rows at a time, so that no model is ever held in memory."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import tensorstore as ts

from openpi_flash_models.checkpoints.safetensors_source import SAFETENSORS_DTYPES
from openpi_flash_models.errors import CheckpointError

BLOCK_BYTES = 64 << 20
"""Target size of what is held at once, and of an array's chunks in the JAX layout. Well above 32 MiB: what is smaller,
glibc may keep after its reader has freed it."""


class Rows(Protocol):
    """An array that is produced in parts: any `np.ndarray`, or something that computes `tensor[start:stop]`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a sibling path to write to, and renames it to `path` on success; a failure leaves nothing behind.

    Raises:
        CheckpointError: `path` exists already and is more than an empty directory.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CheckpointError(f"{path}: exists already; name a new path, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.rename(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[tuple[str, Rows]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file; it appears under its name only when it is whole.

    Args:
        path: the new file.
        layout: shape and element type of each tensor, in the order of the file. Types as in `SAFETENSORS_DTYPES`.
        tensors: the same tensors, in any order; each is asked for once and let go before the next.
        metadata: entries of the header's `__metadata__`.

    Raises:
        CheckpointError: `path` exists, or `tensors` does not hold what `layout` says.
    """
    dtype_names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (shape, dtype) in layout.items():
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_names[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the data aligned to 8 bytes
    missing = set(layout)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors:
            if name not in missing or (tensor.shape, np.dtype(tensor.dtype)) != layout[name]:
                raise CheckpointError(f"{path}: {name}: unexpected tensor of shape {tensor.shape}, {tensor.dtype}")
            missing.remove(name)
            file.seek(8 + len(encoded) + header[name]["data_offsets"][0])
            for _, block in _blocks(tensor):
                file.write(np.ascontiguousarray(block).view(np.uint8).data)
        if missing:
            raise CheckpointError(f"{path}: {len(missing)} tensors were never given, among them {min(missing)}")


def write_jax_params(params_dir: Path, tensors: Iterable[tuple[str, Rows]]) -> None:
    """Writes openpi's `params/`: one OCDBT store of zarr arrays, and the metadata by which Orbax restores the tree.

    Large leaves are chunked along their first axis (a layer, or a band of the embedding), so that they can be read
    with little more memory than they take.

    Args:
        params_dir: the new directory.
        tensors: leaf path joined by `/` (without the root `params`), and its values; each is asked for once.

    Raises:
        CheckpointError: `params_dir` exists and is not empty.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    tree, arrays = {}, []
    with replacing(params_dir) as partial:
        base = {"driver": "file", "path": f"{partial.resolve()}/"}
        for name, tensor in tensors:
            path = ("params", *name.split("/"))
            dtype = np.dtype(tensor.dtype)
            chunk_shape = (min(_block_rows(tensor), tensor.shape[0]), *tensor.shape[1:])
            store = ts.open(
                {
                    "driver": "zarr",
                    "kvstore": {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"},
                    "metadata": {
                        "shape": list(tensor.shape),
                        "chunks": list(chunk_shape),
                        "dtype": "bfloat16" if dtype == ml_dtypes.bfloat16 else dtype.str,
                        "compressor": {"id": "zstd", "level": 1},
                    },
                    "store_data_equal_to_fill_value": True,
                    "create": True,
                },
                context=context,
            ).result()
            for rows, block in _blocks(tensor):
                store[rows].write(block).result()
            tree[str(path)] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in path],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": list(chunk_shape),
                },
            }
            written = {"param_name": ".".join(path), "write_shape": list(chunk_shape)}
            arrays.append({"array_metadata": {**written, "chunk_shape": list(chunk_shape), "ext_metadata": None}})
        metadata = {
            "tree_metadata": tree,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (partial / "_METADATA").write_text(json.dumps(metadata))
        (partial / "array_metadatas").mkdir()
        (partial / "array_metadatas/process_0").write_text(json.dumps({"array_metadatas": arrays}))


def _block_rows(tensor: Rows) -> int:
    row_bytes = math.prod(tensor.shape[1:]) * np.dtype(tensor.dtype).itemsize
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def _blocks(tensor: Rows) -> Iterator[tuple[slice, np.ndarray]]:
    step = _block_rows(tensor)
    for start in range(0, tensor.shape[0], step):
        rows = slice(start, min(start + step, tensor.shape[0]))
        yield rows, tensor[rows]
