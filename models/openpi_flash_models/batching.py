"""Requests of equal shapes in one model call, and each such shape called once before any request: alike for a policy
and a planner."""

import abc
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from openpi_flash_models.errors import PolicyConfigError


class WarmUpShape(NamedTuple):
    """Shape of one model call. `continues`: of chunks that continue others."""

    batch_size: int
    num_views: int
    prompt_bucket: int
    continues: bool = False


class Batchable(Protocol):
    """What is looked at in a prepared request. Those of equal keys can share a call; a deterministic one runs alone."""

    @property
    def shape_key(self) -> Hashable: ...
    @property
    def deterministic(self) -> bool: ...


_BatchableT = TypeVar("_BatchableT", bound=Batchable)


class BatchedModel(abc.ABC):
    """A model and the shapes in which it is called.

    Attributes:
        batch_sizes: numbers of rows of a model call, ascending; smaller batches are padded to the next. Few, so that
            few compile.
        view_counts: numbers of cameras that a valid observation can have, ascending.
        prompt_buckets: padded prompt lengths that can occur, ascending.
    """

    def __init__(self, max_batch_size: int, view_counts: Sequence[int], prompt_buckets: Sequence[int]) -> None:
        """Takes the most requests in a model call; raises PolicyConfigError where that is none."""
        if max_batch_size < 1:
            raise PolicyConfigError(f"max_batch_size: expected at least 1, got {max_batch_size}")
        self.batch_sizes = (*(1 << i for i in range((max_batch_size - 1).bit_length())), max_batch_size)
        self.view_counts = view_counts
        self.prompt_buckets = prompt_buckets

    def warm_up_shapes(self) -> list[WarmUpShape]:
        """Every shape that a request with the usual options can lead to, the smallest batches first."""
        return [
            WarmUpShape(batch_size, num_views, bucket)
            for batch_size in self.batch_sizes
            for num_views in reversed(self.view_counts)
            for bucket in self.prompt_buckets
        ]

    def warm_up(
        self,
        shapes: Sequence[WarmUpShape] | None = None,
        progress: Callable[[int, int, WarmUpShape], None] | None = None,
    ) -> None:
        """Calls the model once for each shape, so that no request waits for a compiler.

        Args:
            shapes: None: all `warm_up_shapes`.
            progress: told before each call how many are done, how many there are, and the shape that is next.
        """
        shapes = self.warm_up_shapes() if shapes is None else shapes
        for done, shape in enumerate(shapes):
            if progress:
                progress(done, len(shapes), shape)
            self._call(shape)

    @abc.abstractmethod
    def _call(self, shape: WarmUpShape) -> None:
        """Calls the model with inputs of this shape and waits for the device."""

    def _rows(self, prepared: Sequence[_BatchableT]) -> list[_BatchableT]:
        """The rows of these requests' model call: the last one is repeated up to the next of `batch_sizes`.

        Raises:
            ValueError: they cannot share a call.
        """
        if len({request.shape_key for request in prepared}) != 1:
            raise ValueError("a batch needs requests of one shape key")
        if len(prepared) > 1 and any(request.deterministic for request in prepared):
            raise ValueError("a deterministic request runs alone")
        if len(prepared) > self.batch_sizes[-1]:
            raise ValueError(f"{len(prepared)} requests in a batch of at most {self.batch_sizes[-1]}")
        num_rows = next(n for n in self.batch_sizes if n >= len(prepared))
        return [*prepared, *[prepared[-1]] * (num_rows - len(prepared))]
