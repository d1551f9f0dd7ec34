"""The PyTorch model at full size, without allocating it, and compiled at a tiny size."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from openpi_flash_models.checkpoints.layout import torch_shapes
from openpi_flash_models.checkpoints.safetensors_source import open_torch_source
from openpi_flash_models.checkpoints.synthetic import make_checkpoint
from openpi_flash_models.config import GemmaConfig, ModelConfig, ModelType, VisionConfig
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.realtime import Continuation, Method, soft_mask
from openpi_flash_models.request import ModelBatch
from openpi_flash_models.torch.backend import KEPT_SCHEDULES, load
from openpi_flash_models.torch.graphs import StaticCalls
from openpi_flash_models.torch.graphs_test import Recorder
from openpi_flash_models.torch.model import Inputs, Pi0
from openpi_flash_models.torch.realtime import sample_committed, sample_guided
from openpi_flash_models.torch.weights import folds, slots

NAMES = json.loads((Path(__file__).parents[3] / "tests/data/golden/parameter_names.json").read_text())
UNREAD = {
    "paligemma_with_expert.gemma_expert.lm_head.weight",  # random, unused
    "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight",  # lm_head's other name
}
HEADS = {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
TINY = ModelConfig(
    vision=VisionConfig(width=8, depth=1, mlp_dim=12, num_heads=2, image_size=28),
    vlm=GemmaConfig(width=16, mlp_dim=20, **HEADS),
    expert=GemmaConfig(width=12, mlp_dim=20, **HEADS),
    vocab_size=32,
    action_dim=4,
    action_horizon=3,
    max_token_len=16,
)


def full_size(model_type):
    config = ModelConfig(model_type=model_type, max_token_len=48 if model_type is ModelType.PI0 else 200)
    with torch.device("meta"):
        return Pi0(config, torch.bfloat16)


def full_size_inputs():
    """Three views and a prompt, on the current default device: on the meta device, shapes and types alone."""
    return Inputs(
        images=torch.empty(1, 3, 224, 224, 3, dtype=torch.uint8),
        tokens=torch.empty(1, 48, dtype=torch.int32),
        token_mask=torch.empty(1, 48, dtype=torch.bool),
        state=torch.empty(1, 32),
        noise=torch.empty(1, 50, 32),
    )


def tiny_batch(*, num_views=2, length=16, num_steps=2, seed=0):
    rng = np.random.default_rng(seed)
    return ModelBatch(
        images=rng.integers(0, 256, (1, num_views, 28, 28, 3), np.uint8),
        tokens=rng.integers(0, 32, (1, length), np.int32),
        token_mask=np.arange(length)[None] < length - 3,
        state=rng.standard_normal((1, 4), np.float32),
        noise=rng.standard_normal((1, 3, 4), np.float32),
        num_steps=num_steps,
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny models in PyTorch's layout, by type."""
    folder = tmp_path_factory.mktemp("checkpoints")
    configs = {model_type: dataclasses.replace(TINY, model_type=model_type) for model_type in ModelType}
    for model_type, config in configs.items():
        make_checkpoint(folder / model_type, config, layout="torch", dtype="float32")
    return {
        model_type: functools.partial(load_tiny, config, folder / model_type) for model_type, config in configs.items()
    }


def load_tiny(config, folder, **options):
    return load(config, open_torch_source(folder), precision="float32", **options)


@pytest.mark.parametrize("model_type", ModelType)
def test_a_full_size_model_reads_exactly_openpis_tensors(model_type):
    model = full_size(model_type)
    wanted = {name: tuple(tensor.shape) for name, tensor in slots(model)}
    for fold in folds(model):
        shape = (fold.into.weight.shape[1],)
        wanted |= {fold.scale: shape} | ({fold.bias: shape} if fold.bias else {})
    openpi = {name: tuple(shape) for name, (shape, _) in NAMES[f"torch_{model_type}"].items() if name not in UNREAD}
    assert wanted == openpi
    assert wanted == torch_shapes(model.config)


@pytest.mark.parametrize("model_type", ModelType)
def test_slots_cover_every_parameter_but_the_pixel_table(model_type):
    model = full_size(model_type)
    held = sum(tensor.numel() for tensor in model.parameters()) - model.vision.pixel_values.numel()
    assert sum(tensor.numel() for _, tensor in slots(model)) == held


@pytest.mark.parametrize("model_type", ModelType)
def test_a_full_size_model_runs_without_waiting_for_the_device(model_type):
    """On the meta device nothing has a value: a step that looked at one would fail."""
    model = full_size(model_type)
    with torch.device("meta"):
        schedule = model.schedule(torch.empty(2, 1024))
        with torch.inference_mode():
            inputs = full_size_inputs()._replace(previous=torch.empty(1, 50, 32), weights=torch.empty(1, 50))
            results = [
                model.sample_actions(inputs, schedule),
                sample_guided(model, inputs, schedule),
                sample_committed(model, inputs, schedule, schedule[0]),
            ]
    for actions in results:
        assert actions.shape == (1, 50, 32)
        assert actions.dtype == torch.float32


@pytest.mark.parametrize("model_type", ModelType)
@pytest.mark.parametrize("method", Method)
def test_a_continued_flow_can_be_called_again_with_other_inputs_in_the_same_place(checkpoints, model_type, method):
    backend = checkpoints[model_type]()
    calls = StaticCalls(functools.partial(backend._bind, method), backend.device, Recorder())
    rng = np.random.default_rng(0)
    for seed in range(3):
        previous = Continuation(rng.standard_normal((1, 3, 4), np.float32), soft_mask(3, 1, 1)[None])
        batch = dataclasses.replace(tiny_batch(seed=seed), continues=method, continuation=previous)
        with torch.inference_mode():
            actions = calls(batch)
        np.testing.assert_array_equal(actions, backend.sample_actions(batch))


def test_compiled_equals_eager(checkpoints):
    """pi0's graph has all that pi0.5's has, and the state token and masks of rows beside it."""
    eager, compiled = checkpoints[ModelType.PI0](), checkpoints[ModelType.PI0](compile_mode="default")
    for batch in (tiny_batch(), tiny_batch(seed=1)):
        np.testing.assert_allclose(compiled.sample_actions(batch), eager.sample_actions(batch), rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ModelType)
def test_a_compiler_sees_one_graph_per_shape_and_takes_many_shapes(checkpoints, model_type, monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    eager, compiled = checkpoints[model_type](), checkpoints[model_type](compile_mode="default")
    shapes = itertools.product(range(3), (4, 8, 16))
    batches = [tiny_batch(num_views=views, length=length, num_steps=1) for views, length in shapes]
    batches.append(tiny_batch(num_steps=2))
    for batch in (*batches, *batches):
        np.testing.assert_array_equal(compiled.sample_actions(batch), eager.sample_actions(batch))
    # A flow step is one graph for each length of the prefix, however many steps there are.
    prefix_lengths = {4 * batch.images.shape[1] + batch.tokens.shape[1] for batch in batches}
    assert len(graphs) == len(batches) - 1 + len(prefix_lengths)


def test_an_unknown_compile_mode_is_refused(checkpoints):
    with pytest.raises(
        PolicyConfigError, match=r"compile_mode: 'fastest' is unknown; expected one of default, reduce-"
    ):
        checkpoints[ModelType.PI05](compile_mode="fastest")


def test_any_number_of_steps_is_computed_once_and_again_when_it_was_dropped(checkpoints):
    backend = checkpoints[ModelType.PI05]()
    counts = range(1, KEPT_SCHEDULES + 2)
    first = [backend.sample_actions(tiny_batch(num_steps=count)) for count in counts]
    for count, expected in zip(counts, first, strict=True):
        np.testing.assert_array_equal(backend.sample_actions(tiny_batch(num_steps=count)), expected)
