"""Tests of the Orbax reader: both layouts on disk, chunks, LoRA terms, and checkpoints that are damaged."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from openpi_flash_models.checkpoints.layout import jax_shapes, validate
from openpi_flash_models.checkpoints.orbax_source import open_jax_source
from openpi_flash_models.checkpoints.safetensors_source_test import GOLDEN, config_of
from openpi_flash_models.checkpoints.write import write_jax_params
from openpi_flash_models.errors import CheckpointError

MODELS = ["pi0_a", "pi05_a", "pi05_e2e"]


def all_leaves(source):
    return {name: source.read(name) for name in source.names()}


def assert_same(source, expected):
    assert set(source.names()) == set(expected)
    for name, array in expected.items():
        assert source.shape(name) == array.shape
        assert source.dtype(name) == array.dtype
        np.testing.assert_array_equal(source.read(name), array)


def write_zarr_directories(params_dir, leaves, ending="", driver="zarr"):
    """As Orbax did before it had OCDBT: a zarr directory per leaf, chunks of fill value left out."""
    for name, array in leaves.items():
        path = params_dir / ("params." + name.replace("/", ".") + ending)
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}, "create": True}
        ts.open(spec, shape=array.shape, dtype=array.dtype).result().write(array).result()


@pytest.mark.parametrize("model", MODELS)
def test_openpi_s_checkpoint_holds_exactly_what_the_model_needs(model, caplog):
    """pi0_a ends its leaves in `value`, pi05_a has several chunks per array, pi05_e2e is in bfloat16."""
    step = GOLDEN / model / "checkpoint"
    source = open_jax_source(step)
    validate(source, jax_shapes(config_of(model)))
    assert not caplog.records
    assert source.dtype("PaliGemma/llm/final_norm/scale") == (
        ml_dtypes.bfloat16 if model == "pi05_e2e" else np.dtype(np.float32)
    )
    leaves = all_leaves(source)
    assert all(array.shape == source.shape(name) for name, array in leaves.items())
    assert_same(open_jax_source(step / "params"), leaves)


def test_chunks_are_put_together():
    embedding = open_jax_source(GOLDEN / "pi05_a/checkpoint").read("PaliGemma/llm/embedder/input_embedding")
    base = {"driver": "file", "path": str(GOLDEN / "pi05_a/checkpoint/params") + "/"}
    path = "params.PaliGemma.llm.embedder.input_embedding/"
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": path}}
    assert ts.open(spec).result().chunk_layout.read_chunk.shape == (256, 40)
    assert embedding.shape == (512, 40)
    assert len(np.unique(embedding, axis=0)) == 512


def test_names_run_from_the_largest_leaf_to_the_smallest():
    source = open_jax_source(GOLDEN / "pi0_a/checkpoint")
    sizes = [source.read(name).nbytes for name in source.names()]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("ending", ["", ".value"])
@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_a_zarr_directory_per_leaf_is_read_too(tmp_path, ending, driver):
    leaves = all_leaves(open_jax_source(GOLDEN / "pi0_a/checkpoint"))
    leaves["action_out_proj/bias"] = np.zeros_like(
        leaves["action_out_proj/bias"]
    )  # not stored: equal to the fill value
    write_zarr_directories(tmp_path / "params", leaves, ending, driver)
    assert_same(open_jax_source(tmp_path), leaves)


def test_value_is_left_alone_unless_every_leaf_ends_in_it(tmp_path):
    leaves = {"a/value": np.ones((2, 2), np.float32), "b": np.ones((2, 2), np.float32)}
    write_jax_params(tmp_path / "params", leaves.items())
    assert_same(open_jax_source(tmp_path), leaves)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_low_rank_terms_are_merged(tmp_path, dtype):
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return rng.standard_normal(shape).astype(dtype)

    attention, mlp = "PaliGemma/llm/layers/attn/", "PaliGemma/llm/layers/mlp_1/"
    leaves = {
        attention + "q_einsum/w": leaf(2, 3, 8, 4),
        attention + "q_einsum/lora_a": leaf(2, 3, 8, 2),
        attention + "q_einsum/lora_b": leaf(2, 3, 2, 4),
        mlp + "gating_einsum": leaf(2, 2, 8, 6),
        mlp + "gating_einsum_lora_a": leaf(2, 2, 8, 2),
        mlp + "gating_einsum_lora_b": leaf(2, 2, 2, 6),
        mlp + "linear": leaf(2, 6, 8),
    }
    write_jax_params(tmp_path / "params", leaves.items())
    source = open_jax_source(tmp_path)
    assert set(source.names()) == {attention + "q_einsum/w", mlp + "gating_einsum", mlp + "linear"}
    wide = {name: array.astype(np.float32) for name, array in leaves.items()}
    merged_query = wide[attention + "q_einsum/w"] + np.einsum(
        "lndr,lnrh->lndh", wide[attention + "q_einsum/lora_a"], wide[attention + "q_einsum/lora_b"]
    )
    merged_gate = wide[mlp + "gating_einsum"] + np.einsum(
        "lgdr,lgrf->lgdf", wide[mlp + "gating_einsum_lora_a"], wide[mlp + "gating_einsum_lora_b"]
    )
    for name, expected in ((attention + "q_einsum/w", merged_query), (mlp + "gating_einsum", merged_gate)):
        assert source.read(name).dtype == dtype
        tolerance = 1e-5 if dtype == np.float32 else 1e-2
        np.testing.assert_allclose(source.read(name).astype(np.float32), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(source.read(mlp + "linear"), leaves[mlp + "linear"])


def test_low_rank_terms_that_do_not_fit_are_typed_errors(tmp_path):
    ones = {"w": np.ones((2, 8, 4), np.float32), "lora_a": np.ones((2, 8, 2), np.float32)}
    write_jax_params(tmp_path / "alone", [("q/lora_a", ones["lora_a"])])
    with pytest.raises(CheckpointError, match="q/lora_a: a low-rank term without"):
        open_jax_source(tmp_path / "alone")
    write_jax_params(tmp_path / "half", [("q/w", ones["w"]), ("q/lora_a", ones["lora_a"])])
    with pytest.raises(CheckpointError, match="no leaf q/lora_b"):
        open_jax_source(tmp_path / "half").read("q/w")
    misfit = [("q/w", ones["w"]), ("q/lora_a", ones["lora_a"]), ("q/lora_b", np.ones((2, 3, 4), np.float32))]
    write_jax_params(tmp_path / "misfit", misfit)
    with pytest.raises(CheckpointError, match="does not add to q/w"):
        open_jax_source(tmp_path / "misfit").read("q/w")


def test_no_damage_to_any_file_goes_unnoticed(tmp_path):
    """Each data file in turn is removed, then cut short: every leaf is right or an error, never silently zero."""
    original = all_leaves(open_jax_source(GOLDEN / "pi0_a/checkpoint"))
    params = tmp_path / "params"
    shutil.copytree(GOLDEN / "pi0_a/checkpoint/params", params)
    damaged_leaves = 0
    for file in [file for file in params.rglob("*") if file.parent.name == "d"]:
        whole = file.read_bytes()
        for cut in (None, whole[: len(whole) // 2]):
            file.unlink(missing_ok=True)
            if cut is not None:
                file.write_bytes(cut)
            try:
                source = open_jax_source(tmp_path)
                assert set(source.names()) == set(original)
            except CheckpointError:
                damaged_leaves += len(original)
                continue
            for name in original:
                try:
                    np.testing.assert_array_equal(source.read(name), original[name])
                except CheckpointError as error:
                    assert name in str(error)
                    damaged_leaves += 1
        file.write_bytes(whole)
    assert damaged_leaves > len(original)
    assert_same(open_jax_source(tmp_path), original)


def test_a_chunk_lost_from_a_zarr_directory_is_noticed_when_orbax_stored_them_all(tmp_path):
    leaves = {"a": np.ones((4, 4), np.float32), "b": np.ones((4, 4), np.float32)}
    write_zarr_directories(tmp_path, leaves)
    (tmp_path / "_METADATA").write_text(json.dumps({"store_array_data_equal_to_fill_value": True}))
    assert_same(open_jax_source(tmp_path), leaves)
    (tmp_path / "params.a/0.0").unlink()
    with pytest.raises(CheckpointError, match="a: damaged or incomplete"):
        open_jax_source(tmp_path).read("a")


def test_what_is_no_checkpoint_is_a_typed_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        open_jax_source(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no Orbax arrays"):
        open_jax_source(tmp_path)
    (tmp_path / "ocdbt.process_0").mkdir()
    with pytest.raises(CheckpointError, match="unfinished"):
        open_jax_source(tmp_path)
    (tmp_path / "manifest.ocdbt").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read as an Orbax checkpoint"):
        open_jax_source(tmp_path)
