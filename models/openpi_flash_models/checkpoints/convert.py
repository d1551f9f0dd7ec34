"""Turns openpi's JAX weights into its PyTorch ones, leaf by leaf."""

import dataclasses
import enum
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from openpi_flash_models.checkpoints import layout as names
from openpi_flash_models.checkpoints.detect import Layout, detect
from openpi_flash_models.checkpoints.layout import jax_shapes, torch_shapes, validate
from openpi_flash_models.checkpoints.mapping import RULES
from openpi_flash_models.checkpoints.safetensors_source import FILE_NAME, TIED_EMBEDDING
from openpi_flash_models.checkpoints.source import TensorSource
from openpi_flash_models.checkpoints.write import replacing, write_safetensors
from openpi_flash_models.config import GEMMA_VARIANTS, GemmaConfig, ModelConfig
from openpi_flash_models.errors import CheckpointError

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class Precision(enum.StrEnum):
    """Element types of the converted weights.

    MIXED is what openpi keeps while it runs: bfloat16, but float32 for the patch and position embedding, the norms of
    both Gemma experts, and the projections of actions, state and time.
    """

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    MIXED = "mixed"


def convert(
    checkpoint_dir: Path,
    out_dir: Path,
    config: ModelConfig,
    precision: Precision = Precision.BFLOAT16,
    progress: Progress | None = None,
) -> None:
    """Writes `model.safetensors`, `config.json` and `assets/` to `out_dir`, which appears only when it is whole.

    One leaf is in memory at a time. The unused random head of the action expert, which openpi's own converter adds
    (its loader demands it), is not written.

    Args:
        checkpoint_dir: a step directory with `params/`, or a `params/` directory. Assets are taken from it or from
            the directory above.
        out_dir: must not exist, or be empty.
        config: sizes; the checkpoint must fit them.

    Raises:
        CheckpointError: the checkpoint does not fit, is damaged, or does not fit in the precision; `out_dir` exists.
    """
    checkpoint = detect(checkpoint_dir, layout=Layout.JAX)
    source = checkpoint.open()
    validate(source, jax_shapes(config))
    header = {name: (shape, _dtype(name, precision)) for name, shape in torch_shapes(config).items()}
    with replacing(out_dir) as partial:
        partial.mkdir()
        tensors = _torch_tensors(source, header, progress or (lambda done, total: None))
        # The tied embedding's other name is recorded as the safetensors library does for shared tensors.
        metadata = {"format": "pt", TIED_EMBEDDING: names.TORCH_EMBEDDING}
        write_safetensors(partial / FILE_NAME, header, tensors, metadata=metadata)
        (partial / "config.json").write_text(json.dumps(describe(config, precision), indent=2) + "\n")
        if checkpoint.assets is not None:
            shutil.copytree(checkpoint.assets, partial / "assets")
    source.close()


def describe(config: ModelConfig, precision: Precision) -> dict[str, Any]:
    """What openpi writes to config.json, and the model type beside it, which openpi's does not tell."""

    def variant(gemma: GemmaConfig) -> Any:
        return next((name for name, known in GEMMA_VARIANTS.items() if known == gemma), dataclasses.asdict(gemma))

    return {
        "action_dim": config.action_dim,
        "action_horizon": config.action_horizon,
        "paligemma_variant": variant(config.vlm),
        "action_expert_variant": variant(config.expert),
        "precision": str(precision),
        "model_type": str(config.model_type),
    }


def _dtype(name: str, precision: Precision) -> np.dtype:
    match precision:
        case Precision.BFLOAT16:
            return np.dtype(ml_dtypes.bfloat16)
        case Precision.FLOAT16:
            return np.dtype(np.float16)
        case Precision.FLOAT32:
            return np.dtype(np.float32)
        case Precision.MIXED:
            wide = not name.startswith(names.TORCH_ROOT) or bool(_WIDE_IN_MIXED.search(name))
            return np.dtype(np.float32 if wide else ml_dtypes.bfloat16)


_WIDE_IN_MIXED = re.compile(r"\.(patch_embedding|position_embedding|input_layernorm|post_attention_layernorm|norm)\.")


@dataclasses.dataclass(frozen=True)
class _Cast:
    """A view that is made contiguous and converted in parts, as they are written."""

    name: str
    view: np.ndarray
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = self.view[rows].astype(self.dtype, order="C")
        if self.dtype == np.float16 and not np.isfinite(cast).all():
            raise CheckpointError(f"{self.name}: a value is too large for float16; use bfloat16 or float32")
        return cast


def _torch_tensors(
    source: TensorSource, header: dict[str, tuple[tuple[int, ...], np.dtype]], progress: Progress
) -> Iterator[tuple[str, _Cast]]:
    total = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in header.values())
    done = 0
    for leaf in source.names():
        if leaf not in RULES:
            continue  # validate has warned of it
        array = source.read(leaf)
        for template, torch_view in RULES[leaf]:
            for layer, row in enumerate(array) if "{layer}" in template else [(0, array)]:
                name = template.format(layer=layer)
                tensor = _Cast(name, torch_view(row), header[name][1])
                yield name, tensor
                done += tensor.view.size * tensor.dtype.itemsize
                progress(done, total)
        del array
        source.release(leaf)
