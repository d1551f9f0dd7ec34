"""Prompts to tokens. Equality with openpi's ids: golden/transforms_test.py."""

import logging
from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models.errors import CheckpointError
from openpi_flash_models.tokenizer import PromptTokenizer, clean_prompt, discretize_state

MODEL = Path(__file__).parents[2] / "tests/data/golden/tokenizer/tiny_visible.model"


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(MODEL)


def test_cleaning_keeps_case_and_inner_spaces():
    assert clean_prompt("  Fold_the  towel\nNow \n") == "Fold the  towel Now"


def test_bins_are_half_open_and_not_clipped_below():
    state = np.array([-1.5, -1.0, -0.9921875, 0.0, 0.9999, 1.0, 7.0, np.nan])
    assert discretize_state(state).tolist() == [-1, 0, 1, 128, 255, 255, 255, 255]


def test_the_state_is_written_into_the_prompt(tokenizer):
    tokens = tokenizer.prompt_tokens("pick_up", np.array([0.0, -1.0]), 200)
    assert tokenizer.decode(tokens) == "Task: pick up, State: 128 0;\nAction: "


def test_without_state_the_prompt_ends_in_a_newline(tokenizer):
    tokens = tokenizer.prompt_tokens("pick_up ", None, 48)
    assert tokenizer.decode(tokens) == "pick up\n"
    assert tokens[0] == 2


def test_cached_tokens_cannot_be_changed_by_a_caller(tokenizer):
    with pytest.raises(ValueError, match="read-only"):
        tokenizer.prompt_tokens("pick up", None, 48)[0] = 7


def test_long_prompts_are_cut_with_one_warning(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tokens = tokenizer.prompt_tokens("open the drawer and " * 40, np.zeros(8), 64)
    assert len(tokens) == 64
    assert len(caplog.records) == 1
    assert "longer than 64 tokens" in caplog.text


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer not found: .*absent\.model"):
        PromptTokenizer(tmp_path / "absent.model")
    (tmp_path / "text.model").write_text("this is no model")
    with pytest.raises(CheckpointError, match=r"text\.model is not a sentencepiece model"):
        PromptTokenizer(tmp_path / "text.model")
