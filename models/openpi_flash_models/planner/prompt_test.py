"""Words around a task: cleaning as in training, and templates that are parsed once."""

import json
from pathlib import Path

import pytest

from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.planner.prompt import (
    ACTION_PROMPT_TEMPLATE,
    GENERATION_PROMPT_FORMAT,
    Template,
    action_prompt,
    clean_task,
    generation_prompt,
)
from openpi_flash_models.tokenizer import PromptTokenizer

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"
FORMAT = Template.parse(GENERATION_PROMPT_FORMAT, "task", field="format")
USUAL = Template.parse(ACTION_PROMPT_TEMPLATE, "task", "subtask", field="template")


def test_prompts_equal_the_public_planners():
    data = json.loads((GOLDEN / "transforms/tokenization.json").read_text(encoding="utf-8"))
    tokenizer = PromptTokenizer(GOLDEN / "tokenizer" / data["tokenizer"])
    for item in data["planner"]:
        text = generation_prompt(FORMAT, item["prompt"])
        assert text == item["text"]
        assert tokenizer.text_tokens(text, item["max_len"]).tolist() == item["tokens"]
    assert len(data["planner"]) > 10


@pytest.mark.parametrize(
    ("task", "cleaned"),
    [
        ("  Fold_the\nTowel. ", "fold the towel"),
        ("wait...", "wait.."),
        ("really?!", "really?"),
        ("5 cups", "5 cups"),
        (".", ""),
        ("", ""),
    ],
)
def test_one_trailing_punctuation_character_goes(task, cleaned):
    assert clean_task(task) == cleaned


@pytest.mark.parametrize("task", ["Fold the towel", "Fold the towel.", " Fold the towel! ", "Fold the towel . "])
def test_a_task_with_a_full_stop_gets_no_second_one(task):
    assert action_prompt(USUAL, task, " pick up the corner ") == "Fold the towel. Subtask: pick up the corner"


def test_punctuation_stays_where_the_template_has_none():
    plain = Template.parse("{task} Now: {subtask}.", "task", "subtask", field="template")
    assert action_prompt(plain, "Fold the towel!", "pick it up.") == "Fold the towel! Now: pick it up."


def test_braces_in_a_task_are_text():
    doubled = Template.parse("{{{task}}} {{}}", "task", field="format")
    assert doubled.fill(task="put {subtask} {0} away") == "{put {subtask} {0} away} {}"


@pytest.mark.parametrize(
    "text", ["", "Task:", "{task} {other}", "{}", "{task!r}", "{task:>9}", "{task.upper}", "{task[0]}", "{task", "}"]
)
def test_what_is_no_template_is_refused(text):
    with pytest.raises(PolicyConfigError, match=r"^generation_prompt_format: .*\{task\}"):
        Template.parse(text, "task", field="generation_prompt_format")
