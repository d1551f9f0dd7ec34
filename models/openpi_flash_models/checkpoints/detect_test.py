"""Tests of recognising a checkpoint by what is in its directory."""

import shutil

import pytest

from openpi_flash_models.checkpoints.detect import Layout, detect
from openpi_flash_models.checkpoints.safetensors_source_test import GOLDEN
from openpi_flash_models.errors import CheckpointError


def test_pytorch_weights_are_recognised_as_directory_and_as_file(tmp_path):
    for path in (GOLDEN / "pi0_a", GOLDEN / "pi0_a/model.safetensors"):
        checkpoint = detect(path)
        assert (checkpoint.layout, checkpoint.assets) == (Layout.TORCH, None)
        assert "state_proj.weight" in checkpoint.open().names()
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert detect(tmp_path).layout is Layout.TORCH


def test_jax_weights_are_recognised_with_their_assets():
    step = GOLDEN / "pi05_e2e/checkpoint"
    for path in (step, step / "params"):
        checkpoint = detect(path)
        assert (checkpoint.layout, checkpoint.weights, checkpoint.assets) == (
            Layout.JAX,
            step / "params",
            step / "assets",
        )
        assert "time_mlp_in/kernel" in checkpoint.open().names()


def test_pytorch_weights_win_over_jax_ones_unless_asked_otherwise(tmp_path):
    shutil.copytree(GOLDEN / "pi0_a/checkpoint", tmp_path, dirs_exist_ok=True)
    shutil.copy(GOLDEN / "pi0_a/model.safetensors", tmp_path)
    assert detect(tmp_path).layout is Layout.TORCH
    assert detect(tmp_path, layout=Layout.JAX).weights == tmp_path / "params"


def test_what_was_looked_for_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors .* and params/"):
        detect(tmp_path)
    with pytest.raises(CheckpointError, match=r"looked for params/ written by Orbax \(JAX\)$"):
        detect(GOLDEN / "pi0_a", layout=Layout.JAX)
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors or .* \(PyTorch\)$"):
        detect(GOLDEN / "pi0_a/checkpoint", layout=Layout.TORCH)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        detect(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        detect(GOLDEN / "README.md")


def test_a_training_run_s_directory_points_to_its_last_step(tmp_path):
    for step in ("999", "20000"):
        (tmp_path / step).mkdir()
    with pytest.raises(CheckpointError, match=f"use {tmp_path / '20000'}"):
        detect(tmp_path)
