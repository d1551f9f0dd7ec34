"""Tests of the random checkpoints and the tiny tokenizer."""

import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from openpi_flash_models.checkpoints.check import check_same_actions, random_batch
from openpi_flash_models.checkpoints.convert import convert
from openpi_flash_models.checkpoints.detect import detect
from openpi_flash_models.checkpoints.layout import jax_shapes, torch_shapes, validate
from openpi_flash_models.checkpoints.synthetic import make_checkpoint, train_tiny_tokenizer
from openpi_flash_models.config import GemmaConfig, ModelConfig, ModelType, VisionConfig
from openpi_flash_models.errors import CheckpointError

SHAPES = {"jax": jax_shapes, "torch": torch_shapes}


def tiny(model_type=ModelType.PI05):
    heads = {"depth": 2, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16}
    return ModelConfig(
        model_type=model_type,
        vision=VisionConfig(width=64, depth=2, mlp_dim=96, num_heads=4, image_size=56),
        vlm=GemmaConfig(width=64, mlp_dim=128, **heads),
        expert=GemmaConfig(width=32, mlp_dim=64, **heads),
        vocab_size=512,
        action_horizon=8,
    )


@pytest.mark.parametrize("model_type", ModelType)
@pytest.mark.parametrize("layout", SHAPES)
def test_a_random_checkpoint_is_complete_and_its_actions_are_of_order_one(layout, model_type, tmp_path):
    config = tiny(model_type)
    make_checkpoint(tmp_path / "c", config, layout=layout, dtype="float32")
    checkpoint = detect(tmp_path / "c")
    assert checkpoint.layout == layout
    validate(checkpoint.open(), SHAPES[layout](config))
    if layout == "jax":
        from openpi_flash_models.jax.backend import load
    else:
        from openpi_flash_models.torch.backend import load
    batch = random_batch(config, seed=0)
    actions = load(config, checkpoint.open(), device="cpu", precision="float32").sample_actions(batch)
    assert 0.3 < actions.std() < 3
    assert np.abs(actions - batch.noise).max() > 0.1


def test_a_converted_random_checkpoint_gives_the_same_actions(tmp_path):
    make_checkpoint(tmp_path / "jax", tiny(), seed=3)
    convert(tmp_path / "jax", tmp_path / "torch", tiny())
    check = check_same_actions(tmp_path / "jax", tmp_path / "torch", tiny())
    assert check.exact
    assert check.passed


@pytest.mark.parametrize("layout", SHAPES)
def test_the_seed_decides_the_weights(layout, tmp_path):
    def weights(directory, seed):
        make_checkpoint(tmp_path / directory, tiny(), layout=layout, seed=seed)
        source = detect(tmp_path / directory).open()
        return {name: source.read(name).astype(np.float32) for name in source.names()}

    first, again, other = weights("a", 1), weights("b", 1), weights("c", 2)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        assert not np.array_equal(array, other[name])
    kernels = [array for name, array in first.items() if name.endswith(("kernel", "weight")) and array.ndim > 1]
    assert len({array.flat[0] for array in kernels}) > len(kernels) / 2  # no two leaves share their numbers


def test_statistics_are_written_for_each_asset_id(tmp_path):
    make_checkpoint(tmp_path / "c", tiny(), asset_ids={"droid": (8, 7), "physical-intelligence/libero": (5, 5)})
    stats = json.loads((tmp_path / "c/assets/droid/norm_stats.json").read_text())["norm_stats"]
    assert {key: len(stats[key]["mean"]) for key in stats} == {"state": 8, "actions": 7}
    for values in stats.values():
        assert np.all(np.array(values["q01"]) < values["mean"]) and np.all(np.array(values["mean"]) < values["q99"])
        assert np.all(np.array(values["std"]) > 0)
    assert (tmp_path / "c/assets/physical-intelligence/libero/norm_stats.json").is_file()


def test_an_existing_directory_is_not_replaced(tmp_path):
    (tmp_path / "keep").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        make_checkpoint(tmp_path, tiny())


PEAK_PROBE = """
import resource, sys
from pathlib import Path
from openpi_flash_models.checkpoints.synthetic import make_checkpoint
from openpi_flash_models.config import GemmaConfig, ModelConfig, VisionConfig

heads = {"depth": 16, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16}
config = ModelConfig(
    vision=VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=1, image_size=28),
    vlm=GemmaConfig(width=1024, mlp_dim=4096, **heads),
    expert=GemmaConfig(width=16, mlp_dim=16, **heads),
    vocab_size=100_000,
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
make_checkpoint(Path(sys.argv[1]), config, layout=sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""


@pytest.mark.parametrize("layout", SHAPES)
def test_a_large_checkpoint_is_written_without_holding_it(layout, tmp_path):
    """615 MB of weights, the largest leaf 268 MB."""
    command = [sys.executable, "-c", PEAK_PROBE, tmp_path / "c", layout]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sum(file.stat().st_size for file in (tmp_path / "c").rglob("*") if file.is_file()) > 450 << 20
    assert int(run.stdout) < 340


def test_the_tiny_tokenizer_has_paligemma_s_settings(tmp_path):
    train_tiny_tokenizer(tmp_path / "tokenizer.model", vocab_size=512)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert pieces.vocab_size() == 512
    assert (pieces.pad_id(), pieces.eos_id(), pieces.bos_id(), pieces.unk_id()) == (0, 1, 2, 3)
    assert pieces.encode("1 23\n", out_type=str) == ["1", "▁", "2", "3", "\n"]
    text = "Task: pick_up  the ö cup, State: 1 255;\nAction: "
    assert pieces.decode(pieces.encode(text)) == text
    assert pieces.unk_id() not in pieces.encode(text)
    assert len(pieces.encode("pick up the red cup")) <= 8
    with pytest.raises(ValueError, match="expected 320 to 680"):
        train_tiny_tokenizer(tmp_path / "other.model", vocab_size=4000)
