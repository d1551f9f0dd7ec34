"""The JAX model at full size, without allocating it, and what is compiled of it."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_flash_models.checkpoints.layout import jax_shapes
from openpi_flash_models.config import ModelConfig, ModelType
from openpi_flash_models.golden.cases import prepared_request, read_case
from openpi_flash_models.golden.compare import GoldenModel
from openpi_flash_models.jax import model
from openpi_flash_models.jax.weights import FLOAT32, abstract_weights, slots
from openpi_flash_models.request import assemble

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"
NAMES = json.loads((GOLDEN / "parameter_names.json").read_text())
BFLOAT16 = np.dtype(jnp.bfloat16)


def full_size(model_type):
    return ModelConfig(model_type=model_type, max_token_len=48 if model_type is ModelType.PI0 else 200)


def abstract_run(config, num_steps):
    """What `sample_actions` takes of a full-size model, as shapes."""
    weights = abstract_weights(config, BFLOAT16)
    time_weights = weights.pop("time")
    embeddings = jax.ShapeDtypeStruct((num_steps, 1024), jnp.float32)
    schedule = jax.eval_shape(functools.partial(model.make_schedule, config), time_weights, embeddings)
    shapes = {
        "images": ((1, 2, 224, 224, 3), jnp.uint8),
        "tokens": ((1, 48), jnp.int32),
        "token_mask": ((1, 48), jnp.bool),
        "state": ((1, 32), jnp.float32),
        "noise": ((1, 50, 32), jnp.float32),
    }
    inputs = model.Inputs(**{name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()})
    return weights, schedule, inputs


@pytest.mark.parametrize("model_type", ModelType)
def test_a_full_size_model_reads_exactly_openpis_leaves(model_type):
    openpi = {name: tuple(shape) for name, (shape, _) in NAMES[f"jax_{model_type}"].items()}
    config = full_size(model_type)
    read = {leaf for slot in slots(config, FLOAT32) for leaf in slot.leaves}
    assert read == set(openpi) == set(jax_shapes(config))
    # Every number of every leaf has one place, and every place one number.
    held = sum(math.prod(slot.shape) for slot in slots(config, FLOAT32))
    assert held == sum(map(math.prod, openpi.values()))


@pytest.mark.parametrize("model_type", ModelType)
def test_a_full_size_model_has_the_right_shapes_throughout(model_type):
    config = full_size(model_type)
    actions = jax.eval_shape(functools.partial(model.sample_actions, config), *abstract_run(config, num_steps=10))
    assert actions.shape == (1, 50, 32)
    assert actions.dtype == jnp.float32


@pytest.mark.parametrize("model_type", ModelType)
def test_more_steps_are_no_more_code(model_type):
    config = full_size(model_type)
    programs = [
        str(jax.make_jaxpr(functools.partial(model.sample_actions, config))(*abstract_run(config, num_steps)))
        for num_steps in (2, 50)
    ]
    assert len(programs[0].splitlines()) == len(programs[1].splitlines())


def test_a_shape_is_compiled_once():
    golden = GoldenModel(GOLDEN / "pi05_a", ["jax"])
    backend = golden.backends["jax"]
    request = prepared_request(golden.config, read_case(golden.path / "case0.npz"), 0, 2)
    compiled = []  # of all backends of this process: jit keeps programs by function
    for noise in (request.noise, request.noise + 1):
        backend.sample_actions(assemble([dataclasses.replace(request, noise=noise)]))
        compiled.append(backend._run._cache_size())
    assert compiled[0] == compiled[1] > 0
