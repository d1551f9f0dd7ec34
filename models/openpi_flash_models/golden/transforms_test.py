"""Transforms equal openpi's, and the check would notice if they did not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models.golden.transforms import check_transforms

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"

QUANTITIES = {
    *("resize_with_pad", "float pictures", "prompt tokens", "state bins", "text tokens", "decoded text"),
    *("normalize", "unnormalize", "delta mask", "delta actions", "absolute actions", "gripper curves"),
    *(
        f"{robot} {what}"
        for robot in ("aloha", "droid", "libero")
        for what in ("state", "masks", "pictures", "actions")
    ),
}


def test_transforms_equal_openpis():
    differences = list(check_transforms(GOLDEN))
    assert {difference.quantity for difference in differences} == QUANTITIES
    assert not [difference for difference in differences if not difference.passes]


def test_nothing_there_is_nothing_checked(tmp_path):
    assert not list(check_transforms(tmp_path))


@pytest.mark.parametrize(
    ("name", "array", "quantity"),
    [
        ("resize_pil", "pil_0_out", "resize_with_pad"),
        ("resize_pil", "to_uint8_out", "float pictures"),
        ("normalize", "norm_quantile_short_f64", "normalize"),
        ("normalize", "unnorm_meanstd_long_f32", "unnormalize"),
        ("delta_actions", "1_absolute", "absolute actions"),
        ("robots", "aloha0_out|state", "aloha state"),
        ("robots", "aloha1_actions_out", "aloha actions"),
        ("robots", "droid1_out|image|base_0_rgb", "droid pictures"),
        ("robots", "libero0_out|image_mask|right_wrist_0_rgb", "libero masks"),
        ("robots", "gripper_from_angular", "gripper curves"),
    ],
)
def test_a_single_wrong_number_is_noticed(tmp_path, name, array, quantity):
    (tmp_path / "transforms").mkdir()
    with np.load(GOLDEN / f"transforms/{name}.npz") as file:
        arrays = dict(file)
    wrong = arrays[array]
    wrong.flat[-1] = not wrong.flat[-1] if wrong.dtype == bool else wrong.flat[-1] + 1
    np.savez(tmp_path / f"transforms/{name}.npz", **arrays)
    failed = [difference for difference in check_transforms(tmp_path) if not difference.passes]
    assert [difference.quantity for difference in failed] == [quantity]


@pytest.mark.parametrize(
    ("group", "entry", "quantity"), [("items", "tokens", "prompt tokens"), ("detokenize", "text", "decoded text")]
)
def test_wrong_tokens_and_text_are_noticed(tmp_path, group, entry, quantity):
    (tmp_path / "transforms").mkdir()
    shutil.copytree(GOLDEN / "tokenizer", tmp_path / "tokenizer")
    data = json.loads((GOLDEN / "transforms/tokenization.json").read_text())
    value = data[group][0][entry]
    data[group][0][entry] = value[:-1]
    (tmp_path / "transforms/tokenization.json").write_text(json.dumps(data))
    failed = [difference for difference in check_transforms(tmp_path) if not difference.passes]
    assert [difference.quantity for difference in failed] == [quantity]
