"""Loading a policy: backend by content, where statistics are looked for, and what is said when they are not there."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models.errors import CheckpointError, PolicyConfigError
from openpi_flash_models.golden.compare import model_config
from openpi_flash_models.load import find_norm_stats, load_policy
from openpi_flash_models.policy_configs import PolicyConfig, load_policy_config

GOLDEN = Path(__file__).parents[2] / "tests/data/golden"
MODEL = GOLDEN / "pi05_e2e"
ASSETS = MODEL / "checkpoint/assets"
TOKENIZER = GOLDEN / "tokenizer/tiny_visible.model"


@pytest.fixture
def config() -> PolicyConfig:
    sizes = model_config(json.loads((MODEL / "config.json").read_text()))
    return dataclasses.replace(load_policy_config("pi05_droid"), model=sizes, tokenizer=TOKENIZER)


def droid_observation() -> dict[str, np.ndarray]:
    return {
        "observation/exterior_image_1_left": np.full((180, 320, 3), 90, np.uint8),
        "observation/wrist_image_left": np.full((224, 224, 3), 0.5, np.float32),
        "observation/joint_position": np.linspace(-1, 1, 7),
        "observation/gripper_position": np.array([0.5]),
    }


def test_the_checkpoints_content_chooses_the_backend(config, tmp_path):
    # The PyTorch file stands beside `assets`, as in a converted checkpoint.
    shutil.copytree(ASSETS, tmp_path / "assets")
    shutil.copy(MODEL / "model.safetensors", tmp_path)
    options = {"precision": "float32", "device": "cpu", "num_steps": 3}
    policies = [load_policy(config, directory, **options) for directory in (tmp_path, MODEL / "checkpoint")]
    assert [policy.backend.name for policy in policies] == ["torch", "jax"]
    torch, jax = (policy.infer(droid_observation(), prompt="open the drawer", seed=1)["actions"] for policy in policies)
    assert torch.shape == (15, 8)
    np.testing.assert_allclose(torch, jax, atol=1e-4)
    repeated = policies[0].infer(droid_observation(), prompt="open the drawer", seed=1)["actions"]
    np.testing.assert_array_equal(torch, repeated)
    assert (
        policies[0].infer(droid_observation(), prompt="open the drawer", seed=1, num_steps=4)["actions"] != torch
    ).any()


def test_paligemmas_tokenizer_is_taken_from_the_cache(config, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    (tmp_path / "big_vision").mkdir()
    shutil.copy(TOKENIZER, tmp_path / "big_vision/paligemma_tokenizer.model")
    stats = ASSETS / "droid/norm_stats.json"
    policy = load_policy(dataclasses.replace(config, tokenizer=None, norm_stats=stats), MODEL, device="cpu")
    assert len(policy.prepare(droid_observation(), prompt="open").request.tokens) > 8


def test_a_backend_that_the_checkpoint_is_not_for_is_refused(config):
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors"):
        load_policy(config, MODEL / "checkpoint", backend="torch")
    with pytest.raises(PolicyConfigError, match="backend: 'tf' is unknown; expected one of auto, torch, jax"):
        load_policy(config, MODEL / "checkpoint", backend="tf")


def test_fp8_reaches_pytorch_and_jax_has_none(config):
    config = dataclasses.replace(config, norm_stats=ASSETS / "droid/norm_stats.json")
    for directory, message in (
        (MODEL, "prefix_precision: fp8 goes with the precision bfloat16, not with float32"),
        (MODEL / "checkpoint", "prefix_precision: fp8 is PyTorch's; the JAX backend has none"),
    ):
        with pytest.raises(PolicyConfigError, match=message):
            load_policy(config, directory, device="cpu", precision="float32", prefix_precision="fp8")


def test_statistics_are_found_in_the_checkpoint_or_one_directory_up(config, tmp_path):
    checkpoint = tmp_path / "converted"
    checkpoint.mkdir()
    with pytest.raises(CheckpointError) as caught:
        find_norm_stats(config, checkpoint)
    for tried in (checkpoint, tmp_path):
        assert str(tried / "assets/droid/norm_stats.json") in str(caught.value)
    shutil.copytree(ASSETS / "droid", tmp_path / "assets/droid")
    above = find_norm_stats(config, checkpoint)
    shutil.copytree(ASSETS / "physical-intelligence/libero", checkpoint / "assets/droid")
    inside = find_norm_stats(config, checkpoint)
    assert above is not None
    assert inside is not None
    assert len(above["actions"].mean) == 8
    assert len(inside["actions"].mean) == 7


def test_statistics_of_an_asset_id_with_a_slash(config):
    libero = dataclasses.replace(load_policy_config("pi05_libero"), model=config.model)
    stats = find_norm_stats(libero, MODEL / "checkpoint")
    assert stats is not None
    assert len(stats["actions"].mean) == 7


def test_statistics_of_the_configuration_go_first(config, tmp_path):
    path = tmp_path / "mine.json"
    own = dataclasses.replace(config, norm_stats=path)
    with pytest.raises(CheckpointError, match=r"no normalisation statistics; tried .*mine\.json$"):
        find_norm_stats(own, MODEL / "checkpoint")
    shutil.copy(ASSETS / "trossen/norm_stats.json", path)
    stats = find_norm_stats(own, MODEL / "checkpoint")
    assert stats is not None
    assert len(stats["state"].mean) == 14


@pytest.mark.parametrize(("backend", "directory"), [("torch", MODEL), ("jax", MODEL / "checkpoint")])
def test_without_its_backend_a_checkpoint_names_the_extra_to_install(backend, directory):
    program = f"""
import dataclasses, sys
from pathlib import Path
sys.modules[{backend!r}] = None  # what an absent package looks like to an import
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy_configs import load_policy_config
config = dataclasses.replace(
    load_policy_config("pi05_droid"), tokenizer=Path({str(TOKENIZER)!r}),
    norm_stats=Path({str(ASSETS / "droid/norm_stats.json")!r}),
)
try:
    load_policy(config, Path({str(directory)!r}))
except PolicyConfigError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (
        f"needs the {backend} backend, which is not installed: pip install 'openpi-flash[{backend}]'" in result.stdout
    )


def test_neither_framework_is_imported_before_a_checkpoint_asks_for_it():
    program = "import sys, openpi_flash_models.load; print(sorted({'torch', 'jax'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
