"""What travels between a policy's transforms and a model backend: one prepared request, and a batch of equal shapes."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from openpi_flash_models.config import ModelConfig
from openpi_flash_models.realtime import Continuation, Method


class ShapeKey(NamedTuple):
    """Requests with equal keys can share a model call. `continues`: how they continue a chunk; None: they do not."""

    num_views: int
    image_dtype: str
    prompt_bucket: int
    num_steps: int
    continues: Method | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedRequest:
    """Model inputs of one request: valid cameras and valid tokens only.

    Attributes:
        images: (num_views, image_size, image_size, 3) uint8, or float32 in [-1, 1]; cameras in the model's order.
        tokens: (num_tokens,) int32, at least one, no padding.
        state: (action_dim,) float32, normalised and padded with zeros.
        noise: (action_horizon, action_dim) float32, the starting point of the flow.
        num_steps: flow steps.
        shape_key: what must agree for two requests to share a model call.
        deterministic: a seed or noise was given: run alone, since a batch of another size may round differently.
        continuation: the chunk that this one continues, by the method of the shape key; None: it begins afresh.
    """

    images: np.ndarray
    tokens: np.ndarray
    state: np.ndarray
    noise: np.ndarray
    num_steps: int
    shape_key: ShapeKey
    deterministic: bool
    continuation: Continuation | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ModelBatch:
    """Inputs of one model call, batch axis first.

    Attributes:
        images: (B, V, image_size, image_size, 3) uint8, or float32 in [-1, 1]; every view is valid. V may be 0.
        tokens: (B, L) int32, padded on the right with 0; L is a prompt bucket.
        token_mask: (B, L) bool, true for valid tokens.
        state: (B, action_dim) float32.
        noise: (B, action_horizon, action_dim) float32.
        num_steps: flow steps.
        continues: how the rows continue earlier chunks; None: they do not.
        continuation: those chunks, with a batch axis; None as `continues`.
    """

    images: np.ndarray
    tokens: np.ndarray
    token_mask: np.ndarray
    state: np.ndarray
    noise: np.ndarray
    num_steps: int
    continues: Method | None = None
    continuation: Continuation | None = None


def assemble(rows: Sequence[PreparedRequest]) -> ModelBatch:
    """Stacks requests of one shape key."""
    tokens, token_mask = pad_tokens([row.tokens for row in rows], rows[0].shape_key.prompt_bucket)
    return ModelBatch(
        images=np.stack([row.images for row in rows]),
        tokens=tokens,
        token_mask=token_mask,
        state=np.stack([row.state for row in rows]),
        noise=np.stack([row.noise for row in rows]),
        num_steps=rows[0].num_steps,
        continues=rows[0].shape_key.continues,
        continuation=_stack([row.continuation for row in rows]),
    )


def _stack(rows: Sequence[Continuation | None]) -> Continuation | None:
    present = [row for row in rows if row is not None]
    return Continuation(*map(np.stack, zip(*present, strict=True))) if present else None


def pad_tokens(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids padded on the right with 0, (B, length) int32, and which of them are valid, (B, length) bool."""
    tokens = np.zeros((len(rows), length), np.int32)
    token_mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        token_mask[i, : len(row)] = True
    return tokens, token_mask


class Backend(Protocol):
    """A loaded model on one device. Not thread-safe: call it from one thread."""

    name: str
    """`torch` or `jax`."""
    config: ModelConfig

    def sample_actions(self, batch: ModelBatch) -> np.ndarray:
        """Runs the flow from noise to actions and waits for the device.

        Returns:
            (B, action_horizon, action_dim) float32: actions as the model sees them, normalised and padded.
        """
        ...
