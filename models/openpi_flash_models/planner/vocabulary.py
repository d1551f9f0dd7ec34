"""Which tokens a subtask may consist of: pieces of printable ASCII, and the end."""

import re

import numpy as np

from openpi_flash_models.errors import CheckpointError
from openpi_flash_models.tokenizer import PromptTokenizer

EOS = 1
"""PaliGemma's <eos>, which ends a subtask."""

_MARKER = re.compile(r"</?\w+>|\[@\w+@\]")
"""Tokens with a meaning of their own that sentencepiece counts as text: <loc0123>, <seg012>, <mask>, <unused7>, …"""


def subtask_vocabulary(tokenizer: PromptTokenizer, vocab_size: int) -> np.ndarray:
    """(vocab_size,) bool: the tokens that may be written.

    Args:
        tokenizer: its vocabulary.
        vocab_size: rows of the model's embedding table, of which those behind the tokenizer's pieces have no text.

    Raises:
        CheckpointError: the tokenizer has more pieces than the table has rows.
    """
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(f"the tokenizer has {tokenizer.vocab_size} pieces, the model's vocabulary {vocab_size}")
    allowed = np.zeros(vocab_size, bool)
    allowed[: tokenizer.vocab_size] = [
        bool(piece) and piece.isascii() and piece.isprintable() and not _MARKER.fullmatch(piece)
        for piece in tokenizer.pieces()
    ]
    allowed[EOS] = True
    return allowed
