"""Loading a planner: what is read of a checkpoint, and what is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models.checkpoints.orbax_source import OrbaxSource
from openpi_flash_models.errors import CheckpointError, PolicyConfigError
from openpi_flash_models.golden.compare import GoldenModel
from openpi_flash_models.planner.config import PI05_SUBTASK, load_planner_config
from openpi_flash_models.planner.load import load_planner

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"
MODEL = GoldenModel(GOLDEN / "pi05_a")
TOKENIZER = GOLDEN / "tokenizer/tiny_visible.model"
CONFIG = dataclasses.replace(PI05_SUBTASK, model=MODEL.config, tokenizer=TOKENIZER)


def test_of_the_action_expert_nothing_is_read(monkeypatch):
    read = []
    whole = OrbaxSource.read
    monkeypatch.setattr(OrbaxSource, "read", lambda self, name: read.append(name) or whole(self, name))
    planner = load_planner(CONFIG, MODEL.path / "checkpoint", device="cpu", precision="float32", max_batch_size=2)
    assert planner.batch_sizes == (1, 2)
    assert set(planner.decoder.weights) == {"vision", "embedding", "vlm_layers", "vlm_norm"}
    assert "PaliGemma/llm/embedder/input_embedding" in read
    assert all(name.startswith("PaliGemma/") for name in read)
    assert not [name for name in read if re.search(r"/llm/.*_1(/|$)", name)]
    observation = {"images": {"cam_high": np.zeros((3, 56, 56), np.uint8)}, "prompt": "fold the towel"}
    assert planner.infer(observation).num_tokens


def test_pytorch_weights_alone_are_refused(tmp_path):
    shutil.copy(MODEL.path / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"holds PyTorch weights only; a planner runs in JAX and needs params/"):
        load_planner(CONFIG, tmp_path)
    shutil.copytree(MODEL.path / "checkpoint/params", tmp_path / "params")
    assert load_planner(CONFIG, tmp_path, device="cpu").config is CONFIG


def test_nothing_that_is_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        load_planner(CONFIG, tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"not a checkpoint: looked for model\.safetensors"):
        load_planner(CONFIG, tmp_path)


def test_pi0_is_refused():
    with pytest.raises(CheckpointError, match=r"a pi0 checkpoint; a planner needs one of pi0\.5"):
        load_planner(CONFIG, GOLDEN / "pi0_a/checkpoint")
    with pytest.raises(PolicyConfigError, match="pi0_droid: a pi0 model writes no subtasks; expected pi05"):
        load_planner_config("pi0_droid")


def test_a_checkpoint_of_another_size_is_refused():
    larger = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL.config, vocab_size=600))
    with pytest.raises(CheckpointError, match="input_embedding"):
        load_planner(larger, MODEL.path / "checkpoint")


def test_unknown_devices_and_precisions_are_refused():
    for options, message in (({"precision": "int8"}, "precision: 'int8'"), ({"device": "abacus"}, "device: 'abacus'")):
        with pytest.raises(PolicyConfigError, match=message):
            load_planner(CONFIG, MODEL.path / "checkpoint", **options)


def test_one_may_name_ones_own_cameras(tmp_path):
    path = tmp_path / "mine.json"
    vlm = dataclasses.asdict(MODEL.config.vlm)
    model = {"model_type": "pi05", "vlm": vlm, "expert": dataclasses.asdict(MODEL.config.expert), "vocab_size": 512}
    model |= {"vision": dataclasses.asdict(MODEL.config.vision), "action_horizon": 8}
    mine = {
        "robot": "raw",
        "model": model,
        "camera_map": {"right_wrist_0_rgb": {"path": "gripper", "required": False}, "base_0_rgb": "overhead"},
        "state": [{"path": "joints", "dim": 6}],
        "robot_action_dim": 6,
        "delta_action_mask": None,
        "normalization": "none",
        "default_prompt": "tidy up",
        "tokenizer": str(TOKENIZER),
    }
    path.write_text(json.dumps(mine))
    planner = load_planner(load_planner_config(path), MODEL.path / "checkpoint", device="cpu")
    images = [np.full((56, 56, 3), level, np.uint8) for level in (10, 20)]
    prepared = planner.prepare({"gripper": images[1], "overhead": images[0]})
    np.testing.assert_array_equal(prepared.images, images)
    assert planner.run([prepared])[0].num_tokens
    np.testing.assert_array_equal(planner.prepare({"overhead": images[0]}).images, images[:1])  # masked, not black
    assert planner.view_counts == [1, 2]


def test_configurations_are_found_by_name():
    assert load_planner_config("pi05_subtask") is PI05_SUBTASK
    droid = load_planner_config("pi05_droid")
    assert [robot.name for robot in droid.robots] == ["droid"]
    assert droid.model.vocab_size == 257152
    with pytest.raises(PolicyConfigError, match="did you mean 'pi05_libero'"):
        load_planner_config("pi05_librero")
