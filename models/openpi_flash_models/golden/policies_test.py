"""Policies equal openpi's from observation to actions in both backends, and the check would notice if they did not."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models.golden.compare import GoldenModel
from openpi_flash_models.golden.policies import check_policies

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"


@pytest.fixture(scope="module")
def model() -> GoldenModel:
    return GoldenModel(GOLDEN / "pi05_e2e")


def test_policies_equal_openpis(model):
    differences = list(check_policies(model))
    assert not [difference for difference in differences if not difference.passes]
    ends = {(d.where, d.subject) for d in differences if d.quantity == "policy, actions"}
    assert ends == {(f"pi05_e2e/{path.stem}", name) for path in model.files("e2e*.npz") for name in ("torch", "jax")}
    assert len(ends) == 8


def test_a_model_without_policies_is_not_loaded():
    model = GoldenModel(GOLDEN / "pi0_a")
    assert not list(check_policies(model))
    assert "backends" not in vars(model)


@pytest.mark.parametrize(
    ("array", "quantity"),
    [
        ("actions", "policy, actions"),
        ("model_in|state", "policy, state"),
        ("model_in|tokenized_prompt", "policy, tokens"),
        ("model_in|image|base_0_rgb|sum", "policy, sum of base_0_rgb"),
        ("model_in|image_mask|right_wrist_0_rgb", "policy, cameras"),
    ],
)
def test_a_wrong_number_is_noticed(model, tmp_path, array, quantity):
    source = GOLDEN / "pi05_e2e/e2e0_pi05_droid.npz"
    with np.load(source) as file:
        arrays = dict(file)
    wrong = arrays[array]
    wrong.flat[0] = not wrong.flat[0] if wrong.dtype == bool else wrong.flat[0] + 1
    folder = tmp_path / "pi05_e2e"
    folder.mkdir()
    shutil.copytree(GOLDEN / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(GOLDEN / "pi05_e2e/checkpoint/assets", folder / "checkpoint/assets")
    shutil.copy(GOLDEN / "pi05_e2e/config.json", folder)
    np.savez(folder / source.name, **arrays)
    copy = GoldenModel(folder)
    vars(copy)["backends"] = {"torch": model.backends["torch"]}
    failed = [difference for difference in check_policies(copy) if not difference.passes]
    assert [difference.quantity for difference in failed] == [quantity]
