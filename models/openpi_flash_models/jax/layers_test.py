"""Layers in a list, as accelerators have them, give what layers in a stack give."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_flash_models import realtime
from openpi_flash_models.checkpoints.orbax_source import open_jax_source
from openpi_flash_models.golden.cases import prepared_request, read_case
from openpi_flash_models.golden.compare import GoldenModel
from openpi_flash_models.golden.planner import planner_batch
from openpi_flash_models.jax import model
from openpi_flash_models.jax.backend import JaxBackend
from openpi_flash_models.jax.weights import LAYERS, VLM, read_weights
from openpi_flash_models.planner.decoder import Decoder
from openpi_flash_models.realtime import Continuation, Method
from openpi_flash_models.request import assemble

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"
MODELS = ("pi0_a", "pi05_a")
STEPS = 3
CPU = jax.devices("cpu")[0]


@functools.cache
def golden(name):
    return GoldenModel(GOLDEN / name)


def weights_of(name, *, stacked, dtype=np.float32, **options):
    source = open_jax_source(GOLDEN / name / "checkpoint")
    return read_weights(golden(name).config, source, np.dtype(dtype), CPU, stacked=stacked, **options)


@functools.cache
def backend(name, *, stacked):
    return JaxBackend(golden(name).config, weights_of(name, stacked=stacked), CPU, num_steps=STEPS)


def batch_of(name, method=None, case=0):
    """One observation. Where it continues a chunk, that is of another observation."""
    config = golden(name).config
    request = prepared_request(config, read_case(GOLDEN / name / f"case{case}.npz"), 0, STEPS)
    if method is None:
        return assemble([request])
    horizon = config.action_horizon
    mask = realtime.soft_mask(horizon, 2, 3) if method is Method.GUIDED else realtime.hard_mask(horizon, 2)
    previous = backend(name, stacked=True).sample_actions(batch_of(name, case=1))[0]
    key = request.shape_key._replace(continues=method)
    return assemble([dataclasses.replace(request, shape_key=key, continuation=Continuation(previous, mask))])


@pytest.mark.parametrize("method", [None, *Method])
@pytest.mark.parametrize("name", MODELS)
def test_actions_are_the_same(name, method):
    batch = batch_of(name, method)
    in_loops, one_by_one = (backend(name, stacked=stacked).sample_actions(batch) for stacked in (True, False))
    np.testing.assert_allclose(one_by_one, in_loops, atol=1e-5)


def listed_numbers(weights):
    """In bfloat16 as an accelerator has it, and not as the bits that a CPU keeps."""
    return {name: part if name == "time" else jax.tree.map(model.numbers, part) for name, part in weights.items()}


@pytest.mark.parametrize("method", [None, *Method])
@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_they_are_as_near_to_float32(name, method):
    batch, config = batch_of(name, method), golden(name).config
    stacks = weights_of(name, stacked=True, dtype=jnp.bfloat16)
    lists = listed_numbers(weights_of(name, stacked=False, dtype=jnp.bfloat16))
    assert {lists["vlm_layers"][0]["qkv"].dtype, lists["embedding"].dtype} == {np.dtype(jnp.bfloat16)}
    in_loops, one_by_one = (
        JaxBackend(config, weights, CPU, num_steps=STEPS).sample_actions(batch) for weights in (stacks, lists)
    )
    exact = backend(name, stacked=True).sample_actions(batch)
    assert np.linalg.norm(one_by_one - exact) <= 2 * np.linalg.norm(in_loops - exact)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_subtasks_are_the_same(precision):
    config, cases = golden("pi05_a").config, [read_case(path) for path in golden("pi05_a").files("planner*.npz")]
    batch = planner_batch(config, cases[0])._replace(max_tokens=np.int32([12]))
    drafts = []
    for stacked in (True, False):
        weights = weights_of("pi05_a", stacked=stacked, dtype=precision, parts=VLM)
        decoder = Decoder(config, weights if stacked else listed_numbers(weights), CPU, cases[0]["vocab_mask"])
        first = decoder.start(batch)
        logits = np.asarray(first.written.logits)  # before `advance` uses them up
        drafts.append((logits, decoder.advance(first)))
    (stack_logits, in_loops), (list_logits, one_by_one) = drafts
    if precision == "float32":
        np.testing.assert_allclose(list_logits, stack_logits, atol=1e-5)
        assert one_by_one.token_ids() == in_loops.token_ids()
    else:
        cosine = np.vdot(list_logits, stack_logits) / np.linalg.norm(list_logits) / np.linalg.norm(stack_logits)
        assert cosine >= 0.999
        assert len(one_by_one.token_ids()[0]) == 12


def test_a_list_holds_the_numbers_of_the_stack():
    stacks, lists = (weights_of("pi05_a", stacked=stacked) for stacked in (True, False))
    for *outer, group in LAYERS:
        stack, layers = (functools.reduce(dict.__getitem__, outer, weights)[group] for weights in (stacks, lists))
        assert isinstance(layers, list)
        for i, layer in enumerate(layers):
            jax.tree.map(np.testing.assert_array_equal, layer, {name: array[i] for name, array in stack.items()})


@pytest.mark.parametrize("stacked", [True, False])
def test_a_flow_step_of_a_list_has_no_loop_in_it(stacked):
    """Then XLA can start all of its kernels as one graph."""
    name = "pi05_a"
    held = backend(name, stacked=stacked)
    inputs, schedule = held.upload(batch_of(name)), held._schedule(STEPS)
    program = jax.jit(model.sample_actions, static_argnums=0).lower(held.config, held.weights, schedule, inputs)
    assert program.as_text().count("stablehlo.while") == (4 if stacked else 1)
