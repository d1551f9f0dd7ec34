"""The one view that backends have of a checkpoint: named tensors, read one at a time."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """Read-only named tensors in one canonical naming, whatever the file called them.

    `torch` sources use openpi's PyTorch names (SPEC §2, no `model.` prefix, the embedding under
    `paligemma_with_expert.paligemma.lm_head.weight`, the unused action-expert head left out). `jax` sources use
    openpi's leaf paths joined by `/` (SPEC §3.3, no trailing `value`), LoRA terms merged.
    """

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, without reading the data."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Stored element type (`ml_dtypes.bfloat16` for bfloat16), without reading the data."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored. The array may be a read-only view of a mapped file: copy it before `release`."""
        ...

    def release(self, name: str) -> None:
        """Gives back the host memory behind `read(name)`; arrays from it are no longer valid."""
        ...

    def close(self) -> None:
        """Closes the files."""
        ...
