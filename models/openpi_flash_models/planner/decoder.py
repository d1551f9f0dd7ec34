"""Loads, compiles and runs the VLM as a writer of text."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from openpi_flash_models.checkpoints.source import TensorSource
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.errors import ModelsError
from openpi_flash_models.jax.backend import parse_placement
from openpi_flash_models.jax.compilation import Options, keep_programs
from openpi_flash_models.jax.model import Weights
from openpi_flash_models.jax.weights import VLM, read_weights
from openpi_flash_models.planner import decode


class Batch(NamedTuple):
    """Inputs of one model call, batch axis first.

    Attributes:
        images: (B, views, image_size, image_size, 3) uint8, or float32 in [-1, 1]; every view is valid.
        tokens: (B, P) int32, padded on the right with 0.
        token_mask: (B, P) bool, true for valid tokens.
        max_tokens: (B,) int32, 1 to `decode.CAPACITY`.
        temperature: (B,) float32; 0: always the likeliest token.
        top_k: (B,) int32, candidates when sampling; 0: all.
        seeds: (B, 2) uint32, upper and lower half.
    """

    images: np.ndarray
    tokens: np.ndarray
    token_mask: np.ndarray
    max_tokens: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    seeds: np.ndarray


class Draft(NamedTuple):
    """A batch in the course of being written, on the device."""

    prefix: decode.Prefix
    written: decode.Written
    sampling: decode.Sampling

    @property
    def is_done(self) -> bool:
        """Whether every row has ended. Waits for the device."""
        return bool(np.asarray(self.written.done).all())

    def token_ids(self) -> list[list[int]]:
        """What each row holds so far. Waits for the device.

        Raises:
            ModelsError: the model gave NaN or infinity, of which no text can be made.
        """
        sound, tokens, lengths = jax.device_get((self.written.sound, self.written.tokens, self.written.lengths))
        if not sound.all():
            raise ModelsError("the planner's logits are not finite; its weights or its precision are at fault")
        return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


class Decoder:
    """A loaded VLM on one device. Not thread-safe.

    Two programs compile for each batch size, number of pictures and padded length of the prompt, at their first call:
    one reads and writes the first token, one writes all others. How many there may be changes neither.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        device: jax.Device,
        allowed: np.ndarray,
        *,
        options: Options | None = None,
    ) -> None:
        """Takes what `read_weights` gives.

        Args:
            config: sizes.
            weights: the parts `weights.VLM`.
            device: where they are.
            allowed: (vocab_size,) bool, tokens that may be written.
            options: of XLA, if any.
        """
        programs = functools.partial(jax.jit, static_argnames="config", compiler_options=options)
        self._start = programs(decode.start)
        self._advance = programs(decode.advance, donate_argnames="written")
        self.config = config
        self.weights = weights
        self.device = device
        self.allowed = jax.device_put(allowed, device)

    def start(self, batch: Batch) -> Draft:
        """Reads pictures and prompt, and writes the first token of every row."""
        images, tokens, token_mask, *choosing = jax.device_put(tuple(batch), self.device)
        inputs, sampling = decode.Inputs(images, tokens, token_mask), decode.Sampling(*choosing)
        # float32 is to mean float32: an accelerator's default would round its products to fewer bits.
        with jax.default_matmul_precision("highest"):
            prefix, written = self._start(self.config, self.weights, inputs, sampling, self.allowed)
        return Draft(prefix, written, sampling)

    def advance(self, draft: Draft, until: int = decode.CAPACITY) -> Draft:
        """Writes until every row has ended or has `until` tokens. Uses `draft` up."""
        with jax.default_matmul_precision("highest"):
            written = self._advance(
                self.config,
                self.weights,
                draft.prefix,
                draft.written,
                sampling=draft.sampling,
                allowed=self.allowed,
                until=np.int32(until),
            )
        return draft._replace(written=written)


def load_decoder(
    config: ModelConfig,
    source: TensorSource,
    allowed: np.ndarray,
    *,
    device: str | None,
    precision: str,
    compilation_cache: Path | None = None,
    data_home: Path | None = None,
) -> Decoder:
    """Reads the VLM of a pi0.5 checkpoint; its action expert is left on disk.

    Args:
        config: sizes; the checkpoint must fit them.
        source: leaves under openpi's JAX paths.
        allowed: (vocab_size,) bool, tokens that may be written.
        device: a JAX platform, e.g. `cuda` or `cpu`; JAX's own choice when None.
        precision: `bfloat16` (mixed, see jax/model.py) or `float32`.
        compilation_cache: where compiled programs are kept; None: see `keep_programs`.
        data_home: the same.

    Raises:
        CheckpointError: a leaf is missing or misshaped.
        PolicyConfigError: an unknown precision, a device that is not there, or a cache that cannot be written to.
    """
    chosen, dtype = parse_placement(device, precision)
    keep_programs(chosen, compilation_cache, data_home)
    return Decoder(config, read_weights(config, source, dtype, chosen, parts=VLM), chosen, allowed)
