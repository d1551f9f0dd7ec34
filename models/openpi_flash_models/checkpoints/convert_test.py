"""Tests of the conversion from JAX to PyTorch, against files that openpi's own converter made."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from openpi_flash_models.checkpoints.check import check_same_actions
from openpi_flash_models.checkpoints.convert import Precision, convert, describe
from openpi_flash_models.checkpoints.detect import detect
from openpi_flash_models.checkpoints.layout import jax_shapes, torch_shapes, validate
from openpi_flash_models.checkpoints.layout_test import NAMES
from openpi_flash_models.checkpoints.mapping import RULES
from openpi_flash_models.checkpoints.orbax_source import open_jax_source
from openpi_flash_models.checkpoints.safetensors_source_test import EXPERT, GOLDEN, config_of
from openpi_flash_models.checkpoints.write import write_jax_params
from openpi_flash_models.config import GemmaConfig, ModelConfig, ModelType, VisionConfig
from openpi_flash_models.errors import CheckpointError

MODELS = ["pi0_a", "pi05_a", "pi05_e2e"]
PRECISION_OF = {"pi0_a": Precision.FLOAT32, "pi05_a": Precision.FLOAT32, "pi05_e2e": Precision.BFLOAT16}


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_equals_that_of_openpi_s_converter(model, tmp_path):
    """Query heads of another total width than the model (all but pi05_e2e) and two kv heads (pi05_a) included."""
    convert(GOLDEN / model / "checkpoint", tmp_path / "out", config_of(model), PRECISION_OF[model])
    expected = load_file(GOLDEN / model / "model.safetensors")
    del expected[EXPERT + "lm_head.weight"]  # random and unused; not in the JAX checkpoint at all
    converted = load_file(tmp_path / "out/model.safetensors")
    assert converted.keys() == expected.keys()
    for name, array in expected.items():
        assert converted[name].dtype == array.dtype
        np.testing.assert_array_equal(converted[name], array, err_msg=name)
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        tied = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
        assert file.metadata()[tied] == "paligemma_with_expert.paligemma.lm_head.weight"


@pytest.mark.parametrize("model", MODELS)
def test_both_backends_give_the_same_actions(model, tmp_path):
    convert(GOLDEN / model / "checkpoint", tmp_path / "out", config_of(model), PRECISION_OF[model])
    check = check_same_actions(GOLDEN / model / "checkpoint", tmp_path / "out", config_of(model))
    assert check.exact
    assert check.max_difference <= 2e-5
    assert check.passed


def test_the_check_notices_a_wrong_conversion(tmp_path):
    """Keys and values swapped: every name and shape is right."""
    source = open_jax_source(GOLDEN / "pi05_e2e/checkpoint")
    leaves = {name: source.read(name) for name in source.names()}
    swapped = "PaliGemma/llm/layers/attn/kv_einsum/w"
    leaves[swapped] = leaves[swapped][:, ::-1]
    write_jax_params(tmp_path / "wrong/params", leaves.items())
    convert(tmp_path / "wrong", tmp_path / "out", config_of("pi05_e2e"))
    check = check_same_actions(GOLDEN / "pi05_e2e/checkpoint", tmp_path / "out", config_of("pi05_e2e"))
    assert not check.passed


@pytest.mark.parametrize("precision", [Precision.BFLOAT16, Precision.FLOAT16, Precision.MIXED])
def test_lower_precisions_are_rounded_once_and_checked_by_cosine(precision, tmp_path):
    convert(GOLDEN / "pi0_a/checkpoint", tmp_path / "out", config_of("pi0_a"), precision)
    exact = load_file(GOLDEN / "pi0_a/model.safetensors")
    for name, array in load_file(tmp_path / "out/model.safetensors").items():
        np.testing.assert_array_equal(array, exact[name].astype(array.dtype))
    check = check_same_actions(GOLDEN / "pi0_a/checkpoint", tmp_path / "out", config_of("pi0_a"))
    assert not check.exact
    assert 1e-5 < check.max_difference < 0.5
    assert check.cosine >= 0.999


@pytest.mark.parametrize("model", MODELS)
def test_mixed_precision_keeps_wide_what_openpi_keeps_wide(model, tmp_path):
    config = config_of(model)
    convert(GOLDEN / model / "checkpoint", tmp_path / "out", config, Precision.MIXED)
    openpi_dtypes = NAMES[f"torch_{config.model_type}"]
    for name, array in load_file(tmp_path / "out/model.safetensors").items():
        assert openpi_dtypes[name][1] == f"torch.{array.dtype.name}", name


@pytest.mark.parametrize("model_type", ModelType)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_any_number_of_kv_heads_and_any_depth_is_covered(model_type, num_kv_heads):
    """Every leaf of a model has a rule, and together they fill every PyTorch tensor in its shape."""
    heads = {"depth": 3, "num_heads": 4, "num_kv_heads": num_kv_heads, "head_dim": 6}
    config = ModelConfig(
        model_type=model_type,
        vision=VisionConfig(width=8, depth=5, mlp_dim=12, num_heads=2, image_size=28),
        vlm=GemmaConfig(width=16, mlp_dim=20, **heads),
        expert=GemmaConfig(width=10, mlp_dim=14, **heads),
        vocab_size=32,
    )
    made = {}
    for leaf, shape in jax_shapes(config).items():
        array = np.empty(shape)
        for template, view in RULES[leaf]:
            for layer, row in enumerate(array) if "{layer}" in template else [(0, array)]:
                made[template.format(layer=layer)] = view(row).shape
    assert made == torch_shapes(config)


def test_equal_query_and_kv_heads_convert_like_separate_leaves(tmp_path):
    heads = {"depth": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    config = ModelConfig(
        vision=VisionConfig(width=8, depth=1, mlp_dim=12, num_heads=2, image_size=28),
        vlm=GemmaConfig(width=16, mlp_dim=20, **heads),
        expert=GemmaConfig(width=12, mlp_dim=14, **heads),
        vocab_size=32,
    )
    rng = np.random.default_rng(0)
    leaves = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in jax_shapes(config).items()}
    write_jax_params(tmp_path / "params", leaves.items())
    convert(tmp_path, tmp_path / "out", config, Precision.FLOAT32)
    converted = load_file(tmp_path / "out/model.safetensors")
    fused = leaves["PaliGemma/llm/layers/attn/qkv_einsum_1/w"]
    for index, letter in enumerate("qkv"):
        tensor = converted[f"{EXPERT}model.layers.1.self_attn.{letter}_proj.weight"]
        for head in range(2):
            np.testing.assert_array_equal(tensor[head * 4 : head * 4 + 4], fused[1, index, head].T)


def test_assets_and_description_come_along(tmp_path):
    reported = []
    convert(
        GOLDEN / "pi05_e2e/checkpoint/params",  # the assets are in its parent
        tmp_path / "out",
        config_of("pi05_e2e"),
        progress=lambda done, total: reported.append((done, total)),
    )
    original = GOLDEN / "pi05_e2e/checkpoint/assets"
    for stats in original.rglob("*.json"):
        assert (tmp_path / "out/assets" / stats.relative_to(original)).read_bytes() == stats.read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "action_dim": 32,
        "action_horizon": 15,
        "paligemma_variant": {
            "width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
        },
        "action_expert_variant": {
            "width": 16, "depth": 2, "mlp_dim": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
        },
        "precision": "bfloat16",
        "model_type": "pi05",
    }  # fmt: skip
    done, total = reported[-1]
    assert done == total == sum(array.nbytes for array in load_file(tmp_path / "out/model.safetensors").values())
    assert reported == sorted(reported)
    assert detect(tmp_path / "out").assets == tmp_path / "out/assets"


def test_named_variants_are_named():
    description = describe(ModelConfig(), Precision.MIXED)
    assert description["paligemma_variant"] == "gemma_2b"
    assert description["action_expert_variant"] == "gemma_300m"


def test_a_failed_conversion_leaves_nothing_behind(tmp_path):
    with pytest.raises(CheckpointError, match="does not fit the model configuration"):
        convert(GOLDEN / "pi0_a/checkpoint", tmp_path / "out", config_of("pi05_a"))
    source = open_jax_source(GOLDEN / "pi0_a/checkpoint")
    leaves = {name: source.read(name) for name in source.names()}
    leaves["action_out_proj/bias"][3] = 1e6
    write_jax_params(tmp_path / "large/params", leaves.items())
    with pytest.raises(CheckpointError, match=r"action_out_proj\.bias: a value is too large for float16"):
        convert(tmp_path / "large", tmp_path / "out", config_of("pi0_a"), Precision.FLOAT16)
    assert [entry.name for entry in tmp_path.iterdir()] == ["large"]


def test_an_existing_result_is_not_replaced(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(GOLDEN / "pi0_a/checkpoint", tmp_path, config_of("pi0_a"))


def test_converted_files_fit_the_model(tmp_path, caplog):
    convert(GOLDEN / "pi0_a/checkpoint", tmp_path / "out", config_of("pi0_a"))
    source = detect(tmp_path / "out").open()
    validate(source, torch_shapes(config_of("pi0_a")))
    assert {source.dtype(name) for name in source.names()} == {np.dtype(ml_dtypes.bfloat16)}
    assert not caplog.records
