"""Prompts to tokens: PaliGemma's sentencepiece vocabulary and openpi's two prompt formats."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from openpi_flash_models.errors import CheckpointError

TOKENIZER_URI = "gs://big_vision/paligemma_tokenizer.model"
"""PaliGemma's tokenizer, the one that all of openpi's models use."""

_STATE_EDGES = np.linspace(-1, 1, 257)[:-1]
"""Left edges of the 256 bins into which pi0.5 prompts put the state."""

logger = logging.getLogger(__name__)


class PromptTokenizer:
    """openpi's prompt formats over one sentencepiece model. Safe to share between threads.

    Attributes:
        vocab_size: number of pieces.
    """

    def __init__(self, model_path: Path) -> None:
        """Reads a sentencepiece model.

        Raises:
            CheckpointError: the file is absent, or no sentencepiece model.
        """
        if not model_path.is_file():
            raise CheckpointError(f"tokenizer not found: {model_path}")
        try:
            self._sentencepiece = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{model_path} is not a sentencepiece model: {error}") from error
        self.vocab_size: int = self._sentencepiece.vocab_size()
        self._newline: list[int] = self._sentencepiece.encode("\n")
        # A robot repeats its prompt hundreds of times.
        self._text_tokens = functools.lru_cache(maxsize=512)(self._encode_text_prompt)
        self._warn_truncated = functools.lru_cache(maxsize=512)(_warn_truncated)

    def prompt_tokens(self, prompt: str, state: np.ndarray | None, max_len: int) -> np.ndarray:
        """Tokens of a prompt, beginning with <bos>, cut from the right beyond `max_len`.

        Args:
            prompt: the task in words; outer white space is dropped, `_` and newlines become spaces.
            state: (d,) normalised state, not padded, to be written into the prompt (pi0.5's format); None for the
                format without state (pi0, and pi0.5 models trained so).
            max_len: most tokens.

        Returns:
            (n,) int32, n ≤ max_len, no padding. Read-only.
        """
        if state is None:
            tokens = self._text_tokens(prompt)
        else:
            bins = " ".join(map(str, discretize_state(state).tolist()))
            text = f"Task: {clean_prompt(prompt)}, State: {bins};\nAction: "
            tokens = np.array(self.encode(text, bos=True), np.int32)
        return self._cut(tokens, prompt, max_len)

    def text_tokens(self, text: str, max_len: int) -> np.ndarray:
        """As `prompt_tokens`, of a text as it stands."""
        return self._cut(np.array(self.encode(text, bos=True), np.int32), text, max_len)

    def pieces(self) -> list[str]:
        """The text of each token, spaces as such; "" where a token stands for none: control tokens, single bytes."""
        ids = list(range(self.vocab_size))
        model = self._sentencepiece
        kinds = (model.is_control(ids), model.is_unknown(ids), model.is_unused(ids), model.is_byte(ids))
        is_textless = map(any, zip(*kinds, strict=True))
        texts = model.id_to_piece(ids)
        return ["" if textless else text.replace("▁", " ") for text, textless in zip(texts, is_textless, strict=True)]

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Tokens of a text as it stands."""
        return self._sentencepiece.encode(text, add_bos=bos)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; control tokens such as <pad> and <eos> give nothing."""
        return self._sentencepiece.decode(list(map(int, ids)))

    def _cut(self, tokens: np.ndarray, text: str, max_len: int) -> np.ndarray:
        if len(tokens) > max_len:
            self._warn_truncated(text, max_len)
            tokens = tokens[:max_len]
        return tokens

    def _encode_text_prompt(self, prompt: str) -> np.ndarray:
        tokens = np.array([*self.encode(clean_prompt(prompt), bos=True), *self._newline], np.int32)
        tokens.flags.writeable = False
        return tokens


def clean_prompt(prompt: str) -> str:
    """Strips outer white space, then turns underscores and newlines into spaces. Case stays."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def discretize_state(state: np.ndarray) -> np.ndarray:
    """Index of the last of 256 equal bins over [-1, 1] whose left edge is ≤ the value: -1 (below) to 255."""
    return np.searchsorted(_STATE_EDGES, state, side="right") - 1


def _warn_truncated(prompt: str, max_len: int) -> None:
    logger.warning("prompt is longer than %d tokens and was cut; its end is lost: %.80r", max_len, prompt)
