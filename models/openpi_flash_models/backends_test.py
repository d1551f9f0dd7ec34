"""What both backends promise beside openpi's numbers: rows, padding and views stay apart, and loading copies."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models import jax as jax_backend
from openpi_flash_models import torch as torch_backend
from openpi_flash_models.checkpoints.convert import Precision, convert
from openpi_flash_models.checkpoints.orbax_source import open_jax_source
from openpi_flash_models.checkpoints.safetensors_source import open_torch_source
from openpi_flash_models.checkpoints.synthetic import make_checkpoint
from openpi_flash_models.config import GemmaConfig, ModelConfig, ModelType, VisionConfig
from openpi_flash_models.errors import CheckpointError, PolicyConfigError
from openpi_flash_models.golden.cases import prepared_request, read_case
from openpi_flash_models.golden.compare import BACKENDS, GoldenModel
from openpi_flash_models.pixels import PIXEL_VALUES
from openpi_flash_models.request import PreparedRequest, ShapeKey, assemble

GOLDEN = Path(__file__).parents[2] / "tests/data/golden"
MODELS = ("pi0_a", "pi05_a")
LOADERS = {"torch": torch_backend.load, "jax": jax_backend.load}
CLOSE = 2e-5
STEPS = 3

pytestmark = pytest.mark.parametrize("name", BACKENDS)


@functools.cache
def golden(model):
    return GoldenModel(GOLDEN / model)


def request_of(model, case=0, **changes):
    """A golden case's first row, with some fields changed."""
    config = golden(model).config
    row = prepared_request(config, read_case(GOLDEN / model / f"case{case}.npz"), 0, STEPS)
    return with_changes(config, row, **changes)


def with_changes(config, request, *, prompt_bucket=None, **changes):
    request = dataclasses.replace(request, **changes)
    key = ShapeKey(
        len(request.images),
        str(request.images.dtype),
        prompt_bucket or config.prompt_bucket(len(request.tokens)),
        request.num_steps,
    )
    return dataclasses.replace(request, shape_key=key)


def open_source(name, path):
    return open_torch_source(path) if name == "torch" else open_jax_source(path / "checkpoint")


def run(backend, *requests):
    return backend.sample_actions(assemble(requests))


def assert_close(actual, expected, tolerance=CLOSE):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("model", MODELS)
def test_rows_of_a_batch_do_not_touch_each_other(name, model):
    backend = golden(model).backends[name]
    first = request_of(model)
    second = with_changes(
        backend.config,
        request_of(model, case=2),
        tokens=first.tokens[:-5],
        noise=first.noise[::-1].copy(),
        prompt_bucket=first.shape_key.prompt_bucket,
    )
    together = run(backend, first, second)
    assert_close(together[:1], run(backend, first))
    assert_close(together[1:], run(backend, second))
    assert np.abs(together[0] - together[1]).max() > 0.01


@pytest.mark.parametrize("model", MODELS)
def test_padding_of_the_prompt_changes_nothing(name, model):
    backend = golden(model).backends[name]
    request = request_of(model, tokens=request_of(model).tokens[:20])
    padded = with_changes(backend.config, request, prompt_bucket=backend.config.max_token_len)
    assert request.shape_key.prompt_bucket < padded.shape_key.prompt_bucket
    assert_close(run(backend, padded), run(backend, request))
    batch = assemble([padded])
    batch.tokens[~batch.token_mask] = 7
    assert_close(backend.sample_actions(batch), run(backend, request))


def test_the_same_input_gives_the_same_bits(name):
    backend = golden("pi05_a").backends[name]
    first = run(backend, request_of("pi05_a"))
    run(backend, request_of("pi05_a", case=1))
    np.testing.assert_array_equal(run(backend, request_of("pi05_a")), first)


def test_every_input_counts(name):
    backend = golden("pi0_a").backends[name]
    request = request_of("pi0_a")
    usual = run(backend, request)
    changes = {
        "images": request.images[::-1].copy(),
        "tokens": request.tokens[::-1].copy(),
        "state": request.state + np.float32(0.5),
        "noise": request.noise + np.float32(0.5),
        "num_steps": STEPS - 1,
    }
    for field, value in changes.items():
        assert np.abs(run(backend, with_changes(backend.config, request, **{field: value})) - usual).max() > 1e-3, field


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_alone_is_enough(name, model):
    backend = golden(model).backends[name]
    request = request_of(model)
    blind = with_changes(backend.config, request, images=request.images[:0])
    actions = run(backend, blind)
    assert actions.shape == (1, *request.noise.shape)
    assert_close(actions, run(golden(model).backends["torch"], blind))
    assert np.abs(actions - run(backend, request)).max() > 1e-3


def test_float_images_are_taken_as_they_are(name):
    backend = golden("pi0_a").backends[name]
    request = request_of("pi0_a")
    as_floats = with_changes(backend.config, request, images=PIXEL_VALUES[request.images])
    assert_close(run(backend, as_floats), run(backend, request), 1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_stays_near_float32(name, model):
    request = request_of(model)
    exact = run(golden(model).backends[name], request)
    rough = run(golden(model).load(name, precision="bfloat16"), request)
    assert rough.dtype == np.float32
    cosine = np.vdot(rough, exact) / (np.linalg.norm(rough) * np.linalg.norm(exact))
    assert cosine >= 0.999
    assert np.abs(rough - exact).max() > 1e-4


@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("model_type", ModelType)
def test_other_sizes_agree_between_the_layouts(name, model_type, num_kv_heads, tmp_path):
    """One layer, as many key/value heads as query heads, stored by openpi in a layout of its own."""
    heads = {"depth": 1, "num_heads": 4, "num_kv_heads": num_kv_heads, "head_dim": 10}
    config = ModelConfig(
        model_type=model_type,
        vision=VisionConfig(width=12, depth=1, mlp_dim=20, num_heads=3, image_size=28, patch_size=7),
        vlm=GemmaConfig(width=20, mlp_dim=28, **heads),
        expert=GemmaConfig(width=16, mlp_dim=24, **heads),
        vocab_size=64,
        action_dim=6,
        action_horizon=5,
        max_token_len=24,
    )
    make_checkpoint(tmp_path / "jax", config, dtype="float32")
    convert(tmp_path / "jax", tmp_path / "torch", config, Precision.FLOAT32)
    rng = np.random.default_rng(0)
    request = PreparedRequest(
        images=rng.integers(0, 256, (2, 28, 28, 3), np.uint8),
        tokens=rng.integers(0, 64, 9, np.int32),
        state=rng.standard_normal(6, np.float32),
        noise=rng.standard_normal((5, 6), np.float32),
        num_steps=10,
        shape_key=ShapeKey(2, "uint8", 24, 10),
        deterministic=True,
    )
    expected = torch_backend.load(config, open_torch_source(tmp_path / "torch"), precision="float32")
    source = open_jax_source(tmp_path / "jax") if name == "jax" else open_torch_source(tmp_path / "torch")
    # Loading for another number of steps first also passes through the schedules that are made on demand.
    actual = LOADERS[name](config, source, device="cpu", precision="float32", num_steps=2)
    assert_close(run(actual, request), run(expected, request))


class Poisoned:
    """A source whose arrays turn to NaN when they are released, as those of a file that is unmapped would be lost."""

    def __init__(self, source):
        self._source = source
        self._held = {}
        self.most_held = 0

    def __getattr__(self, name):
        return getattr(self._source, name)

    def read(self, name):
        array = self._source.read(name).copy()
        self._held.setdefault(name, []).append(array)
        self.most_held = max(self.most_held, len(self._held))
        return array

    def release(self, name):
        for array in self._held.pop(name):
            array[...] = np.nan


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_of_the_source_outlives_its_release(name, precision):
    model = golden("pi0_a")
    source = Poisoned(open_source(name, model.path))
    backend = LOADERS[name](model.config, source, device="cpu", precision=precision)
    expected = model.load(name, precision)
    np.testing.assert_array_equal(run(backend, request_of("pi0_a")), run(expected, request_of("pi0_a")))
    assert not source._held
    # A packed array takes at most queries, keys and values together.
    assert source.most_held <= 3


def test_a_checkpoint_of_another_size_is_refused(name):
    model = golden("pi05_a")
    config = dataclasses.replace(model.config, action_dim=8)
    source = open_source(name, model.path)
    with pytest.raises(CheckpointError, match=r"action_in_proj.*shape"):
        LOADERS[name](config, source, device="cpu")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("precision", "int4", r"precision: 'int4'.*bfloat16, float32"), ("device", "abacus", "device: 'abacus'")],
)
def test_an_unknown_option_is_refused(name, option, value, message):
    model = golden("pi0_a")
    source = open_source(name, model.path)
    with pytest.raises(PolicyConfigError, match=message):
        LOADERS[name](model.config, source, **{option: value})
