"""The configuration: checked alike when it is loaded, when it is changed, and by what works with it."""

import itertools

import pytest
from openpi_flash.v1 import planner_pb2
from openpi_flash_common.errors import InvalidArgumentError
from openpi_flash_common.settings import PlannerSettings, PlannerTuning
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.planner.planner import GeneratedSubtask, GenerationOptions
from openpi_flash_models.planner.prompt import Template
from pydantic import ValidationError

from openpi_flash_planner.configuration import Configuration

PLACES = {"generation_prompt_format": ("task",), "action_prompt_template": ("task", "subtask")}
PIECES = ("{task}", "{subtask}", "{", "}", "{{", "}}", "{}", "{task!r}", "{task:>9}", "{task:}", "{task.x}", "{0}", "a")
TEXTS = ["".join(pieces) for count in range(4) for pieces in itertools.product(PIECES, repeat=count)]


def configuration(**tuning) -> Configuration:
    return Configuration(PlannerTuning(**tuning))


def is_loaded(field: str, value: object) -> bool:
    try:
        PlannerSettings(**{"checkpoint_dir": "-", field: value})
    except ValidationError:
        return False
    return True


def is_changed(field: str, value: object) -> bool:
    try:
        configuration().updated(planner_pb2.UpdateConfigRequest(**{field: value}))
    except InvalidArgumentError as error:
        assert error.field == field
        return False
    return True


@pytest.mark.parametrize("field", PLACES)
def test_a_template_is_judged_alike_wherever_it_is_checked(field):
    accepted = 0
    for text in TEXTS:
        try:
            Template.parse(text, *PLACES[field], field=field)
        except PolicyConfigError:
            is_parsed = False
        else:
            is_parsed = True
        assert is_loaded(field, text) == is_changed(field, text) == is_parsed, text
        accepted += is_parsed
    assert 10 < accepted < len(TEXTS) / 2


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_generation_tokens", (0, 1, 256, 257)),
        ("temperature", (-0.5, 0.0, 10.0, 10.5, float("nan"), float("inf"))),
        ("top_k", (0, 2**32 - 1)),
    ],
)
def test_a_number_is_judged_alike_wherever_it_is_checked(field, values):
    for value in values:
        try:
            GenerationOptions(**{field: value})
        except PolicyConfigError:
            is_option = False
        else:
            is_option = True
        assert is_loaded(field, value) == is_changed(field, value) == is_option, value


def test_a_change_leaves_the_rest_as_it_is():
    before = configuration(top_k=7, cadence="background", action_prompt_template="{subtask} ({task})")
    after = before.updated(planner_pb2.UpdateConfigRequest(temperature=0.5))
    assert after.tuning == before.tuning.model_copy(update={"temperature": 0.5})
    assert (after.options.temperature, after.options.top_k) == (0.5, 7)
    assert before.options.temperature == 0


def test_the_action_prompt_is_empty_where_nothing_was_written():
    subtask = GeneratedSubtask(task="Fold the towel.", text="", token_ids=(1,), is_whole=True)
    assert configuration().action_prompt(subtask) == ""
