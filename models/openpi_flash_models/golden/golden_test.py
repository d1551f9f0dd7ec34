"""Both backends against openpi's numbers, and a checker that notices when they differ."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models.golden.__main__ import main
from openpi_flash_models.golden.cases import check_cases
from openpi_flash_models.golden.compare import Difference, GoldenModel, largest_difference

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"
FLOW = {"timesteps", "time_embedding_f64"}
BETWEEN = {"actions, 10 steps", "actions, 4 steps"}
OUTPUTS = {"actions", "actions_torch", "actions_4steps", "suffix_embeds_t1", "suffix_out_t1", "v_t1"}
OUTPUTS |= {"x_trajectory", "v_trajectory"}
VISION = {f"vit_base_{name}" for name in ("stem_posemb", "block0", "encoded", "projected")}
INSIDE = {
    "pi0_a": VISION | {"prefix_embeds", "prefix_out"} | {f"prefix_{kv}_layer{i}" for kv in "kv" for i in (0, 1)},
    "pi05_a": VISION | {"prefix_embeds", "prefix_out"} | {f"prefix_{kv}_layer{i}" for kv in "kv" for i in (0, 2)},
    "pi05_e2e": {"prefix_embeds_every16", "prefix_out_every16"},
}


@pytest.mark.parametrize("model", INSIDE)
def test_models_equal_openpi(model):
    differences = list(check_cases(GoldenModel(GOLDEN / model)))
    beyond = [difference for difference in differences if not difference.passes]
    assert not beyond
    found = {subject: {d.quantity for d in differences if d.subject == subject} for subject in ("flow", "torch-jax")}
    assert found == {"flow": FLOW, "torch-jax": BETWEEN}
    adaptive = set() if model == "pi0_a" else {"adarms_cond_t1"}
    for backend in ("torch", "jax"):
        quantities = {difference.quantity for difference in differences if difference.subject == backend}
        assert quantities == OUTPUTS | INSIDE[model] | adaptive


@pytest.fixture
def copied(tmp_path):
    """A folder with one golden model, one of its cases, and what changes an array of that case."""
    target = tmp_path / "golden/some_model"
    target.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "case1.npz"):
        shutil.copy(GOLDEN / "pi0_a" / name, target)

    def change(name, function):
        with np.load(target / "case1.npz") as file:
            arrays = dict(file)
        arrays[name] = function(arrays[name])
        np.savez(target / "case1.npz", **arrays)

    return tmp_path / "golden", change


def test_a_folder_of_any_name_passes(copied, capsys):
    folder, _ = copied
    assert main([str(folder), "--backend", "torch"]) == 0
    assert "some_model/case1[0]" in capsys.readouterr().out
    assert main([str(folder / "some_model"), "--backend", "torch"]) == 0


def nan_first(array):
    array = array.copy()
    array.flat[0] = np.nan
    return array


@pytest.mark.parametrize(
    ("quantity", "change"),
    [
        ("actions_torch", lambda array: array + np.float32(3e-5)),
        ("actions", lambda array: array + np.float32(2e-3)),
        ("actions_4steps", nan_first),
        ("x_trajectory", lambda array: array + np.float32(2e-4)),
        ("prefix_k_layer1", lambda array: array[:, ::-1]),
        ("v_t1", lambda array: array[:, :-1]),
        ("timesteps", lambda array: (1 - np.arange(10) / 10).astype(np.float32)),
    ],
)
def test_a_difference_beyond_its_tolerance_fails(copied, capsys, quantity, change):
    folder, change_array = copied
    change_array(quantity, change)
    assert main([str(folder), "--backend", "torch"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "TOO FAR" in line]
    assert [line.split()[0] for line in lines] == [quantity]


def test_nothing_to_compare_is_a_failure(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "holds no golden data" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_is_named(copied, capsys):
    folder, _ = copied
    description = folder / "some_model/config.json"
    description.write_text(description.read_text().replace('"action_dim": 32', '"action_dim": 31'))
    assert main([str(folder), "--backend", "torch"]) == 1
    assert "action_in_proj" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_no_tolerance_admits_what_is_not_finite(value):
    array = np.array([0.0, value])
    assert not Difference("x", "torch", "here", largest_difference(array, np.zeros(2)), 1.0).passes
    assert not Difference("x", "torch", "here", value, 1.0).passes
