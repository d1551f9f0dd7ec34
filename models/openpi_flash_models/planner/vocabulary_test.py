"""What a subtask may consist of."""

from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models.errors import CheckpointError
from openpi_flash_models.planner.vocabulary import EOS, subtask_vocabulary
from openpi_flash_models.tokenizer import PromptTokenizer

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"
TOKENIZER = PromptTokenizer(GOLDEN / "tokenizer/tiny_visible.model")


def test_only_printable_ascii_and_the_end_are_allowed():
    allowed = subtask_vocabulary(TOKENIZER, 512)
    texts = [TOKENIZER.decode([i]) for i in np.flatnonzero(allowed) if i != EOS]
    assert all(text and text.isascii() and text.isprintable() for text in texts)
    assert not [text for text in texts if text[0] + text[-1] in ("<>", "[]") and len(text) > 2]
    assert {" ", "e", ",", "7"} <= set(texts)
    assert allowed[EOS]


def test_what_the_public_planner_lets_pass_is_not():
    """Bytes, <loc>, <seg>, <pad>, <bos>, <unk>: its mask has them, and they reached its text."""
    with np.load(GOLDEN / "pi05_a/planner0.npz") as file:
        public = file["vocab_mask"]
    allowed = subtask_vocabulary(TOKENIZER, 512)
    ours_alone = np.flatnonzero(allowed & ~public)
    assert not len(ours_alone)
    assert public.sum() > allowed.sum() + 256
    control, loc, seg = [0, 2, 3], slice(488, 504), slice(504, 512)
    assert public[loc].all()
    for refused in (control, loc, seg):
        assert not allowed[refused].any()
    every_byte = [i for i in range(512) if TOKENIZER._sentencepiece.is_byte(i)]
    assert len(every_byte) == 256
    assert public[every_byte].any()
    assert not allowed[every_byte].any()


def test_rows_of_the_table_without_a_piece_are_never_written():
    assert not subtask_vocabulary(TOKENIZER, 600)[512:].any()
    with pytest.raises(CheckpointError, match="512 pieces, the model's vocabulary 500"):
        subtask_vocabulary(TOKENIZER, 500)
