"""The JAX model at full size, without allocating it, and what is compiled of it."""

import dataclasses
import functools
import gc
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_flash_models import flow
from openpi_flash_models.checkpoints.layout import jax_shapes
from openpi_flash_models.config import ModelConfig, ModelType
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.golden.cases import prepared_request, read_case
from openpi_flash_models.golden.compare import GoldenModel
from openpi_flash_models.jax import model
from openpi_flash_models.jax.compilation import keep_programs
from openpi_flash_models.jax.weights import FLOAT32, abstract_weights, slots
from openpi_flash_models.request import assemble

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"
NAMES = json.loads((GOLDEN / "parameter_names.json").read_text())
BFLOAT16 = np.dtype(jnp.bfloat16)


def full_size(model_type):
    return ModelConfig(model_type=model_type, max_token_len=48 if model_type is ModelType.PI0 else 200)


def abstract_run(config, num_steps, *, stacked=True):
    """What `sample_actions` takes of a full-size model, as shapes."""
    weights = abstract_weights(config, BFLOAT16, stacked=stacked)
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


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("model_type", ModelType)
def test_a_full_size_model_has_the_right_shapes_throughout(model_type, stacked):
    config = full_size(model_type)
    arguments = abstract_run(config, num_steps=10, stacked=stacked)
    actions = jax.eval_shape(functools.partial(model.sample_actions, config), *arguments)
    assert actions.shape == (1, 50, 32)
    assert actions.dtype == jnp.float32


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("model_type", ModelType)
def test_more_steps_are_no_more_code(model_type, stacked):
    config = full_size(model_type)
    run = functools.partial(model.sample_actions, config)
    programs = [str(jax.make_jaxpr(run)(*abstract_run(config, steps, stacked=stacked))) for steps in (2, 50)]
    assert len(programs[0].splitlines()) == len(programs[1].splitlines())


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("model_type", ModelType)
def test_products_of_float32_are_exact_and_those_of_bfloat16_ask_for_nothing(model_type, guided):
    """For one that asked for more than the ordinary, XLA would make no kernel of its own."""
    arguments = abstract_run(full_size(model_type), num_steps=2)
    if guided:
        shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 50, 32), (1, 50)))
        arguments = (*arguments, model.Guided(*shapes))
    with jax.default_matmul_precision("highest"):
        program = jax.make_jaxpr(functools.partial(model.sample_actions, full_size(model_type)))(*arguments)
    found = {True: set(), False: set()}
    for equation in equations(program.jaxpr):
        if equation.primitive.name == "dot_general":
            is_float32 = all(factor.aval.dtype == jnp.float32 for factor in equation.invars)
            found[is_float32].update(equation.params["precision"])
    assert found == {True: {jax.lax.Precision.HIGHEST}, False: {jax.lax.Precision.DEFAULT}}


def equations(program):
    """Those of a program and of all programs within it."""
    for equation in program.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_a_shape_is_compiled_once():
    golden = GoldenModel(GOLDEN / "pi05_a", ["jax"])
    backend = golden.backends["jax"]
    request = prepared_request(golden.config, read_case(golden.path / "case0.npz"), 0, 2)
    compiled = []  # of all backends of this process: jit keeps programs by function
    for noise in (request.noise, request.noise + 1):
        backend.sample_actions(assemble([dataclasses.replace(request, noise=noise)]))
        compiled.append(backend._run._cache_size())
    assert compiled[0] == compiled[1] > 0


def test_what_only_schedules_are_made_of_is_not_kept_on_the_device():
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    backend = GoldenModel(GOLDEN / "pi05_a", ["jax"]).backends["jax"]
    gc.collect()
    kept = sum(array.nbytes for array in jax.live_arrays()) - before
    schedule = jax.tree.leaves(backend._schedule(flow.DEFAULT_NUM_STEPS))
    assert kept == sum(array.nbytes for array in [*jax.tree.leaves(backend.weights), *schedule])
    assert all(isinstance(array, np.ndarray) for array in jax.tree.leaves(backend.time_weights))


COUNT_COMPILATIONS = """
import collections, hashlib, sys
from pathlib import Path
import jax
from openpi_flash_models.golden.cases import prepared_request, read_case
from openpi_flash_models.golden.compare import GoldenModel
from openpi_flash_models.request import assemble

counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
golden = GoldenModel(Path(sys.argv[1]))
backend = golden.load("jax", compilation_cache=Path(sys.argv[2]))
request = prepared_request(golden.config, read_case(golden.path / "case0.npz"), 0, 2)
actions = backend.sample_actions(assemble([request]))
print(counts["cache_misses"], counts["cache_hits"], hashlib.sha256(actions.tobytes()).hexdigest())
"""


def test_a_second_process_compiles_nothing(tmp_path):
    command = [sys.executable, "-c", COUNT_COMPILATIONS, GOLDEN / "pi05_a", tmp_path / "cache"]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(2)]
    (compiled, found, first), (compiled_again, found_again, second) = runs
    assert int(compiled) > 0
    assert (found, compiled_again) == ("0", "0")
    assert found_again == compiled
    assert first == second


def test_programs_are_kept_where_it_is_said(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(jax.config, "update", kept.__setitem__)
    cpu, gpu = (types.SimpleNamespace(platform=platform) for platform in ("cpu", "gpu"))
    keep_programs(cpu, None, tmp_path)
    keep_programs(gpu, None, None)
    assert not kept
    assert not list(tmp_path.iterdir())
    keep_programs(gpu, None, tmp_path)
    assert kept["jax_compilation_cache_dir"] == str(tmp_path / "compiled/jax")
    keep_programs(cpu, tmp_path / "here", tmp_path)
    assert kept["jax_compilation_cache_dir"] == str(tmp_path / "here")
    assert (tmp_path / "here").is_dir()


def test_a_cache_that_cannot_be_made_is_an_error_where_it_was_asked_for(tmp_path, caplog):
    (tmp_path / "file").touch()
    gpu = types.SimpleNamespace(platform="gpu")
    with pytest.raises(PolicyConfigError, match=r"cannot make .*/file/x: Not a directory"):
        keep_programs(gpu, tmp_path / "file/x", None)
    keep_programs(gpu, None, tmp_path / "file")
    assert "are not kept" in caplog.text
