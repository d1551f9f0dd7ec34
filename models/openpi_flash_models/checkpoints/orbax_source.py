"""Reads openpi's JAX weights (Orbax `params/`) with tensorstore alone: no JAX, no Orbax."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from openpi_flash_models.errors import CheckpointError

_ARRAY_METADATA = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
"""Key that marks an array → tensorstore driver."""

_LORA_SUFFIXES = {"/lora_a": "/w", "/lora_b": "/w", "_lora_a": "", "_lora_b": ""}
"""Ending of a low-rank factor's leaf → what the leaf that it adds to has instead."""


def open_jax_source(path: Path) -> "OrbaxSource":
    """Opens the weights of a step directory (with `params/` inside) or a `params/` directory itself.

    Both ways in which Orbax has written them are read: one OCDBT store, and older ones with a zarr directory per array.
    Arrays may be in any number of chunks and any floating type. `.value` at the end of every leaf is left out, and
    low-rank (LoRA) leaves are merged into the weights they adapt when those are read.

    Raises:
        CheckpointError: there is no such checkpoint, or it is unfinished or damaged.
    """
    params_dir = path / "params" if (path / "params").is_dir() else path
    if not params_dir.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{params_dir.resolve()}/"}
    if (params_dir / "manifest.ocdbt").is_file():
        kvstore = {"driver": "ocdbt", "base": kvstore}
    elif any(params_dir.glob("ocdbt.process_*")):
        raise CheckpointError(f"{params_dir}: unfinished: its processes' parts were never merged")
    # Decoded chunks are handed over, never kept: the caller is the only owner of what it reads.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    try:
        keys = [key.decode() for key in ts.KvStore.open(kvstore, context=context).result().list().result()]
        found = {
            key.removesuffix(ending): driver
            for key in keys
            for ending, driver in _ARRAY_METADATA.items()
            if key.endswith(ending)
        }
        strict = _stores_every_chunk(params_dir)
        opening = {key: ts.open(_spec(driver, kvstore, key, strict), context=context) for key, driver in found.items()}
        arrays = {key: store.result() for key, store in opening.items()}
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{params_dir}: cannot be read as an Orbax checkpoint: {error}") from error
    if not arrays:
        raise CheckpointError(f"{params_dir}: holds no Orbax arrays (neither manifest.ocdbt nor <leaf>/.zarray)")
    return OrbaxSource(params_dir, _leaves(arrays))


class OrbaxSource:
    """A `TensorSource` of Orbax leaves. `names()` runs from the largest leaf to the smallest: a loader that copies in
    this order never has a large source array beside a nearly complete copy of the model."""

    def __init__(self, path: Path, leaves: Mapping[str, ts.TensorStore]) -> None:
        self.path = path
        self._lora = {name: base for name in leaves if (base := _lora_base(name)) is not None}
        if orphans := [name for name, base in self._lora.items() if base not in leaves]:
            raise CheckpointError(f"{path}: {orphans[0]}: a low-rank term without the weight that it adds to")
        self._leaves = leaves

    def names(self) -> Iterable[str]:
        names = (name for name in self._leaves if name not in self._lora)
        return sorted(names, key=lambda name: math.prod(self.shape(name)), reverse=True)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._leaf(name).shape)

    def dtype(self, name: str) -> np.dtype:
        return self._leaf(name).dtype.numpy_dtype

    def read(self, name: str) -> np.ndarray:
        """A new array, which the caller alone holds."""
        weight = self._read_leaf(name)
        for lora_a in (leaf for leaf, base in self._lora.items() if base == name and leaf.endswith("lora_a")):
            self._add_lora(name, weight, lora_a)
        return weight

    def release(self, name: str) -> None:
        """Nothing to do: arrays from `read` belong to the caller."""

    def close(self) -> None:
        self._leaves = {}

    def _add_lora(self, name: str, weight: np.ndarray, name_a: str) -> None:
        name_b = name_a.removesuffix("a") + "b"
        factor_a, factor_b = self._read_leaf(name_a), self._read_leaf(name_b)
        if (*factor_a.shape[:-1], *factor_b.shape[-1:]) != weight.shape or factor_a.shape[-1] != factor_b.shape[-2]:
            raise CheckpointError(
                f"{self.path}: {name_a} {factor_a.shape} times {name_b} {factor_b.shape} "
                f"does not add to {name} {weight.shape}"
            )
        # alpha / rank is 1 in every openpi variant, so the product needs no scale. One layer at a time, in float32.
        for layer in range(len(weight)):
            product = factor_a[layer].astype(np.float32) @ factor_b[layer].astype(np.float32)
            weight[layer] = (weight[layer].astype(np.float32) + product).astype(weight.dtype)

    def _read_leaf(self, name: str) -> np.ndarray:
        try:
            return self._leaf(name).read().result()
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.path}: {name}: damaged or incomplete: {error}") from error

    def _leaf(self, name: str) -> ts.TensorStore:
        try:
            return self._leaves[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no leaf {name}") from None


def _spec(driver: str, kvstore: dict[str, Any], key: str, strict: bool) -> dict[str, Any]:
    prefix = kvstore.get("path", "")
    spec = {"driver": driver, "kvstore": {**kvstore, "path": f"{prefix}{key}/"}, "open": True}
    return {**spec, "fill_missing_data_reads": False} if strict else spec


def _stores_every_chunk(params_dir: Path) -> bool:
    """Whether a missing chunk is damage. Older Orbax leaves out chunks that hold only the fill value, zero."""
    try:
        return bool(json.loads((params_dir / "_METADATA").read_bytes())["store_array_data_equal_to_fill_value"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _leaves(arrays: Mapping[str, ts.TensorStore]) -> dict[str, ts.TensorStore]:
    """Dotted keys below the root item `params` → leaf paths joined by `/`."""
    paths = {tuple(key.replace("/", ".").split(".")): store for key, store in arrays.items()}
    if all(path[0] == "params" for path in paths):
        paths = {path[1:]: store for path, store in paths.items()}
    if all(path[-1] == "value" for path in paths):
        paths = {path[:-1]: store for path, store in paths.items()}
    return {"/".join(path): store for path, store in paths.items()}


def _lora_base(name: str) -> str | None:
    for ending, replacement in _LORA_SUFFIXES.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + replacement
    return None
