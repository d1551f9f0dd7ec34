"""The planner's tokens and logits equal those of openpi-flash's, and the check would notice if they did not."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models.golden.compare import GoldenModel
from openpi_flash_models.golden.planner import check_planners

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"
QUANTITIES = {"planner prompt", "initial_logits", "step_logits", "tokens_masked", "tokens_unmasked", "subtask"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """The model's folder, without its cases."""
    folder = tmp_path / "pi05_a"
    shutil.copytree(GOLDEN / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(GOLDEN / "pi05_a/checkpoint", folder / "checkpoint")
    shutil.copy(GOLDEN / "pi05_a/config.json", folder)
    return folder


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """One case."""
    with np.load(GOLDEN / "pi05_a/planner1.npz") as file:
        return dict(file)


def test_tokens_and_logits_equal_the_planners():
    model = GoldenModel(GOLDEN / "pi05_a")
    differences = list(check_planners(model))
    assert not [difference for difference in differences if not difference.passes]
    found = {(difference.where, difference.quantity) for difference in differences}
    assert found == {(f"pi05_a/planner{i}", quantity) for i in range(3) for quantity in QUANTITIES}
    assert "backends" not in vars(model)


def test_without_jax_there_is_nothing_to_check():
    assert not list(check_planners(GoldenModel(GOLDEN / "pi05_a", ["torch"])))


@pytest.mark.parametrize(
    ("array", "index", "quantities"),
    [
        ("tokens_masked", 0, {"tokens_masked"}),
        ("tokens_unmasked", 11, {"tokens_unmasked"}),
        ("step_logits", 7, {"step_logits"}),
        ("initial_logits", 7, {"initial_logits"}),
        ("in_prompt", None, {"planner prompt"}),
        ("text", None, {"subtask"}),
    ],
)
def test_a_wrong_number_is_noticed(folder, arrays, array, index, quantities):
    if index is None:
        arrays[array] = np.array("something else")
    else:
        arrays[array].flat[index] += 1
    np.savez(folder / "planner1.npz", **arrays)
    failed = [difference for difference in check_planners(GoldenModel(folder)) if not difference.passes]
    assert {difference.quantity for difference in failed} == quantities


def test_a_masked_camera_is_dropped(folder, arrays):
    arrays["prefix_mask"][0, 32:48] = False  # the camera that the public planner made up
    np.savez(folder / "planner1.npz", **arrays)
    failed = {difference.quantity for difference in check_planners(GoldenModel(folder)) if not difference.passes}
    assert {"initial_logits", "step_logits"} <= failed
