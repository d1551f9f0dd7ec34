"""Policy configurations from files: inheritance, and errors that name the entry."""

import json
import re
from pathlib import Path

import pytest

from openpi_flash_models.config import GEMMA_VARIANTS, ModelType
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.images import ImageLayout
from openpi_flash_models.normalize import Normalization
from openpi_flash_models.policy_config_file import read_policy_config
from openpi_flash_models.policy_configs import POLICY_CONFIGS, PolicyConfig, load_policy_config
from openpi_flash_models.realtime import Method
from openpi_flash_models.robots.aloha import aloha

ROOT = Path(__file__).parents[2]
RAW = {
    "extends": "pi05_droid",
    "robot": "raw",
    "camera_map": {"base_0_rgb": "front"},
    "state": [{"path": "q", "dim": 6}],
    "robot_action_dim": 6,
    "delta_action_mask": None,
    "asset_id": "arm",
}


def read(directory: Path, values: object) -> PolicyConfig:
    path = directory / "policy.json"
    path.write_text(json.dumps(values))
    return read_policy_config(path)


def test_the_example_loads():
    config = load_policy_config(ROOT / "examples/my_finetune.json")
    assert config.name == "pi05_my_arm"
    assert config.model.action_horizon == 16
    assert config.model.vlm == GEMMA_VARIANTS["gemma_2b"]
    assert [(c.camera, c.path, c.required) for c in config.robot.cameras] == [
        ("base_0_rgb", "images/front", True),
        ("left_wrist_0_rgb", "images/wrist", False),
    ]
    assert (config.robot.state_dim, config.robot.action_dim, config.delta_action_mask) == (7, 7, (6, -1))
    assert config.normalization is Normalization.QUANTILE
    assert config.metadata["reset_pose"] == [0, -1.2, 1.2, 0, 0, 0]


def test_the_documentation_names_every_entry():
    # Every key that a file may have, as the parser's own error lists them.
    documented = set(re.findall(r"^\| `([a-z_]+)`", (ROOT / "docs/custom-policy.md").read_text(), re.MULTILINE))
    expected = {"extends", "name", "model", "robot", "adapt_to_pi", *RAW, "delta_action_mask", "norm_stats"}
    expected |= {"normalization", "default_prompt", "tokenizer", "metadata", "asset_id", "real_time_chunking"}
    expected |= {"model_type", "action_dim", "action_horizon", "max_token_len", "discrete_state_input"}
    expected |= {"vlm", "expert", "vision", "vocab_size"}
    assert documented == expected


def test_the_documentations_examples_load(tmp_path):
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "docs/custom-policy.md").read_text(), re.DOTALL)
    first, example = map(json.loads, blocks)
    assert read(tmp_path, first).asset_id == "my_lab/shirts"
    assert example == json.loads((ROOT / "examples/my_finetune.json").read_text())


def test_what_a_file_does_not_say_is_inherited(tmp_path):
    config = read(tmp_path, {"extends": "pi05_aloha", "default_prompt": "wave"})
    base = POLICY_CONFIGS["pi05_aloha"]
    assert config.name == "policy"
    assert config.default_prompt == "wave"
    for field in ("model", "robot", "normalization", "delta_action_mask", "asset_id", "metadata"):
        assert getattr(config, field) == getattr(base, field), field


def test_a_checkpoint_may_be_trained_for_real_time_chunking(tmp_path):
    assert read(tmp_path, {"extends": "pi05_droid"}).real_time_chunking is Method.GUIDED
    trained = read(tmp_path, {"extends": "pi05_droid", "real_time_chunking": "trained"})
    assert trained.real_time_chunking is Method.TRAINED


def test_null_takes_away_what_would_be_inherited(tmp_path):
    config = read(tmp_path, {"extends": "pi0_aloha_towel", "delta_action_mask": None, "default_prompt": None})
    assert config.delta_action_mask is None
    assert config.default_prompt is None


def test_another_robot_inherits_only_the_model(tmp_path):
    config = read(tmp_path, {"extends": "pi05_aloha", "robot": "droid", "delta_action_mask": None, "asset_id": "droid"})
    assert config.model == POLICY_CONFIGS["pi05_aloha"].model
    assert config.metadata == {}
    with pytest.raises(PolicyConfigError, match="delta_action_mask is missing: give a mask, or null"):
        read(tmp_path, {"extends": "pi05_aloha", "robot": "droid", "asset_id": "droid"})
    with pytest.raises(PolicyConfigError, match="asset_id or norm_stats is needed for quantile"):
        read(tmp_path, {"extends": "pi05_aloha", "robot": "droid", "delta_action_mask": None})


def test_another_model_type_brings_its_own_defaults(tmp_path):
    config = read(tmp_path, {"extends": "pi05_droid", "model": {"model_type": "pi0", "action_horizon": 10}})
    assert config.model == POLICY_CONFIGS["pi0_droid"].model
    assert config.normalization is Normalization.ZSCORE


def test_without_a_base_everything_essential_is_said(tmp_path):
    values = {
        "name": "x",
        "model": {"model_type": "pi0", "vlm": "gemma_2b_lora", "expert": {"width": 512}, "vocab_size": 300},
        "robot": "aloha",
        "adapt_to_pi": False,
        "delta_action_mask": [6, -1],
        "asset_id": "me/mine",
        "normalization": "quantile",
        "tokenizer": "tokens/my.model",
        "norm_stats": "../stats.json",
    }
    config = read(tmp_path, values)
    assert config.model.model_type is ModelType.PI0
    assert config.model.max_token_len == 48
    assert config.model.vlm == GEMMA_VARIANTS["gemma_2b"]
    assert (config.model.expert.width, config.model.expert.mlp_dim) == (512, 4096)
    assert config.robot == aloha(adapt_to_pi=False)
    assert config.normalization is Normalization.QUANTILE
    assert config.tokenizer == tmp_path / "tokens/my.model"
    assert config.norm_stats == tmp_path / "../stats.json"
    for key in ("model", "robot", "delta_action_mask"):
        with pytest.raises(PolicyConfigError, match=f"{key} is missing"):
            read(tmp_path, {k: v for k, v in values.items() if k != key})


def test_raw_cameras_may_say_their_layout(tmp_path):
    camera = {"path": "front", "layout": "chw", "required": True}
    config = read(tmp_path, {**RAW, "camera_map": {"left_wrist_0_rgb": camera}})
    assert config.robot.cameras[0].layout is ImageLayout.CHW


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"defualt_prompt": "x"}, "defualt_prompt: unknown entry; did you mean `default_prompt`"),
        ({"robot": "driod"}, "robot: no robot 'driod'; did you mean `droid`"),
        ({"adapt_to_pi": True}, "adapt_to_pi: unknown entry"),
        ({"camera_map": {}}, "camera_map: unknown entry"),
        ({"normalization": "minmax"}, "normalization: expected one of quantile, zscore, none"),
        ({"real_time_chunking": "off"}, "real_time_chunking: expected one of guided, trained, got 'off'"),
        ({"delta_action_mask": [6, 0]}, "delta_action_mask: expected a list of integers"),
        ({"delta_action_mask": "6"}, 'delta_action_mask: expected a list, got "6"'),
        ({"delta_action_mask": [14]}, "delta_action_mask covers 14 dimensions, .* share 8"),
        ({"metadata": None}, "metadata: expected an object, got null"),
        ({"model": {"horizon": 3}}, r"model\.horizon: unknown entry"),
        ({"model": {"vlm": {"widht": 3}}}, r"model\.vlm\.widht: unknown entry; did you mean `width`"),
        ({"model": {"vlm": "gemma_3b"}}, r"model\.vlm: no variant 'gemma_3b'; did you mean `gemma_"),
        ({"model": {"vision": "so400m"}}, r"model\.vision: no variant"),
        ({"model": {"expert": {"depth": 3}}}, "the two experts must agree in .* differ in depth"),
        ({"model": {"action_dim": 0}}, r"model\.action_dim: expected a positive integer, got 0"),
        ({"model": {"action_dim": 4}}, "8 state dimensions do not fit the model's action_dim 4"),
        ({"model": {"action_dim": True}}, r"model\.action_dim: expected an integer, got true"),
        ({"model": {"model_type": "pi1"}}, r"model\.model_type: expected one of pi0, pi05, got 'pi1'"),
        (
            {"model": {"model_type": "pi0", "discrete_state_input": True}},
            r"model\.discrete_state_input: .* expected false",
        ),
    ],
)
def test_errors_name_the_file_and_the_entry(tmp_path, values, message):
    with pytest.raises(PolicyConfigError, match=message) as caught:
        read(tmp_path, {"extends": "pi05_droid", **values})
    assert "policy.json" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"camera_map": {"front": "base_0_rgb"}}, "no camera 'front' in the model; it has base_0_rgb"),
        ({"camera_map": {"base_0_rgb": {"layout": "hwc"}}}, r"camera_map\.base_0_rgb\.path is missing"),
        ({"camera_map": {"base_0_rgb": {"path": "a", "layout": "hcw"}}}, r"base_0_rgb\.layout: expected one of"),
        ({"camera_map": {"base_0_rgb": 3}}, r"camera_map\.base_0_rgb: expected a string or an object, got 3"),
        ({"state": []}, "0 state dimensions do not fit"),
        ({"state": [{"path": "q"}]}, r"state\[0\]\.dim is missing"),
        ({"state": [{"path": "q", "dim": -1}]}, r"state\[0\]\.dim: expected a positive integer"),
        ({"state": [{"path": "q", "dim": 6, "unit": 1}]}, r"state\[0\]\.unit: unknown entry"),
        ({"robot_action_dim": "6"}, 'robot_action_dim: expected an integer, got "6"'),
    ],
)
def test_errors_in_a_raw_robot_name_the_entry(tmp_path, values, message):
    with pytest.raises(PolicyConfigError, match=message):
        read(tmp_path, {**RAW, **values})


@pytest.mark.parametrize("key", ["camera_map", "state", "robot_action_dim"])
def test_a_raw_robot_needs_all_its_entries(tmp_path, key):
    with pytest.raises(PolicyConfigError, match=f"{key} is missing"):
        read(tmp_path, {name: value for name, value in RAW.items() if name != key})


@pytest.mark.parametrize(
    ("values", "message"),
    [([], r"the file: expected an object, got \[\]"), ({"extends": "pi05_driod"}, "did you mean 'pi05_droid'")],
)
def test_errors_in_the_file_as_a_whole(tmp_path, values, message):
    with pytest.raises(PolicyConfigError, match=message):
        read(tmp_path, values)


def test_what_is_no_json_is_said_to_be_none(tmp_path):
    (tmp_path / "policy.json").write_text("{")
    with pytest.raises(PolicyConfigError, match=r"policy\.json is not JSON"):
        load_policy_config(tmp_path / "policy.json")
