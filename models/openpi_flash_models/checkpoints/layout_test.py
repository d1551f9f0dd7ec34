"""Tests of the tables of names and shapes, against the names that openpi's own models have."""

import json
from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models.checkpoints import layout
from openpi_flash_models.config import GemmaConfig, ModelConfig, ModelType, VisionConfig
from openpi_flash_models.errors import CheckpointError

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"
NAMES = json.loads((GOLDEN / "parameter_names.json").read_text())

LEFT_OUT = {
    # The tied embedding appears twice in memory; it is one tensor, kept under lm_head.
    "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight",
    # The action expert never predicts text: this head is random and unused.
    "paligemma_with_expert.gemma_expert.lm_head.weight",
}
TINY = ModelConfig(
    model_type=ModelType.PI05,
    vision=VisionConfig(width=8, depth=1, mlp_dim=12, num_heads=2, image_size=28),
    vlm=GemmaConfig(width=16, depth=2, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=4),
    expert=GemmaConfig(width=12, depth=2, mlp_dim=20, num_heads=2, num_kv_heads=1, head_dim=4),
    vocab_size=64,
    action_horizon=4,
)


class ShapesOnly:
    """A source without data."""

    def __init__(self, shapes, dtype=np.float32):
        self.shapes = shapes
        self.element_type = np.dtype(dtype)

    def names(self):
        return list(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def dtype(self, name):
        return self.element_type

    def read(self, name):
        raise AssertionError("validation reads no data")

    def release(self, name):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("model_type", ModelType)
def test_full_size_pytorch_names_and_shapes_are_openpi_s(model_type):
    expected = {name: tuple(shape) for name, (shape, _) in NAMES[f"torch_{model_type}"].items()}
    assert expected.keys() > LEFT_OUT
    kept = {name: shape for name, shape in expected.items() if name not in LEFT_OUT}
    assert layout.torch_shapes(ModelConfig(model_type=model_type)) == kept


@pytest.mark.parametrize("model_type", ModelType)
def test_full_size_jax_leaves_and_shapes_are_openpi_s(model_type):
    expected = {name: tuple(shape) for name, (shape, _) in NAMES[f"jax_{model_type}"].items()}
    assert layout.jax_shapes(ModelConfig(model_type=model_type)) == expected


def test_equal_query_and_kv_heads_share_one_jax_leaf():
    gemma = GemmaConfig(width=16, depth=2, mlp_dim=24, num_heads=2, num_kv_heads=2, head_dim=4)
    shapes = layout.jax_shapes(ModelConfig(vision=TINY.vision, vlm=gemma, expert=gemma, vocab_size=64))
    assert shapes["PaliGemma/llm/layers/attn/qkv_einsum/w"] == (2, 3, 2, 16, 4)
    assert not any("q_einsum/" in name and "qkv_einsum" not in name for name in shapes)


def test_a_fitting_checkpoint_passes_and_unknown_tensors_are_named_in_a_warning(caplog):
    shapes = layout.torch_shapes(TINY)
    layout.validate(ShapesOnly(shapes), shapes)
    assert not caplog.records
    layout.validate(ShapesOnly(shapes | {"ema.decay": (1,)}), shapes)
    assert "ema.decay" in caplog.text


def test_missing_and_misshaped_tensors_are_named_and_the_rest_counted():
    shapes = layout.torch_shapes(TINY)
    found = dict(shapes)
    del found["time_mlp_in.weight"]
    found["action_in_proj.weight"] = (32, 12)
    with pytest.raises(CheckpointError) as error:
        layout.validate(ShapesOnly(found), shapes)
    assert "time_mlp_in.weight: missing (expected shape (12, 12))" in str(error.value)
    assert "action_in_proj.weight: shape (32, 12), expected (12, 32)" in str(error.value)
    assert "more" not in str(error.value)
    with pytest.raises(CheckpointError, match=rf"and {len(shapes) - 5 - 1} more"):
        layout.validate(ShapesOnly({"time_mlp_in.bias": (12,)}), shapes)


@pytest.mark.parametrize("shapes_of", [layout.torch_shapes, layout.jax_shapes])
def test_the_other_model_type_and_another_size_are_recognised(shapes_of):
    pi0 = ModelConfig(model_type=ModelType.PI0, vision=TINY.vision, vlm=TINY.vlm, expert=TINY.expert, vocab_size=64)
    with pytest.raises(CheckpointError, match=r"looks like a pi0 checkpoint, and the configuration is for pi0\.5"):
        layout.validate(ShapesOnly(shapes_of(pi0)), shapes_of(TINY))
    with pytest.raises(CheckpointError, match=r"looks like a pi0\.5 checkpoint, and the configuration is for pi0$"):
        layout.validate(ShapesOnly(shapes_of(TINY)), shapes_of(pi0))
    with pytest.raises(CheckpointError, match=r"VLM width is 16, and the configuration's is 2048"):
        layout.validate(ShapesOnly(shapes_of(TINY)), shapes_of(ModelConfig()))


def test_weights_that_are_no_floats_are_refused():
    shapes = layout.torch_shapes(TINY)
    layout.validate(ShapesOnly(shapes, np.float16), shapes)
    with pytest.raises(CheckpointError, match="element type int8, expected a float"):
        layout.validate(ShapesOnly(shapes, np.int8), shapes)


def test_a_file_of_something_else_is_recognised():
    with pytest.raises(CheckpointError, match="no tensors of a pi0"):
        layout.validate(ShapesOnly({}), layout.torch_shapes(TINY))
