"""What a directory holds: PyTorch weights, JAX weights, and where its normalisation statistics are."""

import dataclasses
import enum
from pathlib import Path

from openpi_flash_models.checkpoints.orbax_source import open_jax_source
from openpi_flash_models.checkpoints.safetensors_source import FILE_NAME, INDEX_NAME, open_torch_source
from openpi_flash_models.checkpoints.source import TensorSource
from openpi_flash_models.errors import CheckpointError


class Layout(enum.StrEnum):
    """Which framework wrote the weights, and so which backend reads them."""

    TORCH = "torch"
    JAX = "jax"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint on this machine.

    Attributes:
        root: the directory that was asked for (a file's own directory).
        layout: PyTorch or JAX.
        weights: what to open: a safetensors file or its directory, or the `params` directory.
        assets: directory with `<asset_id>/norm_stats.json`, in the checkpoint or beside it; None when there is none.
    """

    root: Path
    layout: Layout
    weights: Path
    assets: Path | None

    def open(self) -> TensorSource:
        """Opens the weights under their canonical names. Raises CheckpointError when they are damaged."""
        return open_torch_source(self.weights) if self.layout is Layout.TORCH else open_jax_source(self.weights)


def detect(path: Path, *, layout: Layout | None = None) -> Checkpoint:
    """Recognises a checkpoint by what is in it.

    A directory with both kinds of weights counts as PyTorch, as in openpi: a converted file is put beside the original
    in order to be used. `layout` asks for one kind instead.

    Raises:
        CheckpointError: nothing there is a checkpoint (of the kind asked for); it says what was looked for.
    """
    if path.is_file() and path.suffix == ".safetensors" and layout is not Layout.JAX:
        return Checkpoint(path.parent, Layout.TORCH, path, _assets(path.parent))
    if not path.is_dir():
        raise CheckpointError(f"{path}: {'not a checkpoint' if path.exists() else 'no such file or directory'}")
    if layout is not Layout.JAX and any((path / name).is_file() for name in (FILE_NAME, INDEX_NAME)):
        return Checkpoint(path, Layout.TORCH, path, _assets(path))
    if layout is not Layout.TORCH:
        for params in (path / "params", path):
            if _is_params(params):
                return Checkpoint(path, Layout.JAX, params, _assets(path))
    wanted = {
        Layout.TORCH: f"{FILE_NAME} or {INDEX_NAME} (PyTorch)",
        Layout.JAX: "params/ written by Orbax (JAX)",
    }
    looked_for = " and ".join(text for kind, text in wanted.items() if layout in (None, kind))
    steps = sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdecimal() and entry.is_dir())
    hint = f"; it holds training steps: use {path / str(steps[-1])}" if steps else ""
    raise CheckpointError(f"{path}: not a checkpoint: looked for {looked_for}{hint}")


def _is_params(path: Path) -> bool:
    markers = ("manifest.ocdbt", "ocdbt.process_*", "_METADATA", "*/.zarray", "*/zarr.json")
    return path.is_dir() and any(True for marker in markers for _ in path.glob(marker))


def _assets(root: Path) -> Path | None:
    """openpi keeps statistics in `<step>/assets`; one level up covers a bare params directory and a converted file."""
    return next((found for found in (root / "assets", root.parent / "assets") if found.is_dir()), None)
