"""Real-time chunking: the papers' numbers by hand, the flow against a plain reference, and the seam between chunks."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_flash_models import flow, realtime
from openpi_flash_models.golden.cases import prepared_request, read_case
from openpi_flash_models.golden.compare import GoldenModel, model_config
from openpi_flash_models.jax import model
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy_configs import load_policy_config
from openpi_flash_models.realtime import Continuation, Method
from openpi_flash_models.request import assemble

GOLDEN = Path(__file__).parents[2] / "tests/data/golden"
MODELS = ("pi0_a", "pi05_a")
STEPS = 5
DELAY, EXECUTED = 2, 3


@functools.cache
def golden(name):
    return GoldenModel(GOLDEN / name, ["jax"])


def plain_request(name, case=0):
    return prepared_request(golden(name).config, read_case(GOLDEN / name / f"case{case}.npz"), 0, STEPS)


def previous_chunk(name):
    """What is left of another observation's chunk, padded."""
    chunk = golden(name).backends["jax"].sample_actions(assemble([plain_request(name, case=1)]))[0]
    return np.concatenate([chunk[EXECUTED:], np.zeros_like(chunk[:EXECUTED])])


def continued(request, method, actions, delay=DELAY):
    weights = weights_of(method, len(actions), delay)
    key = request.shape_key._replace(continues=method)
    return dataclasses.replace(request, shape_key=key, continuation=Continuation(actions, weights))


def weights_of(method, horizon, delay=DELAY):
    if method is Method.GUIDED:
        return realtime.soft_mask(horizon, delay, EXECUTED)
    return realtime.hard_mask(horizon, delay)


def run(name, *requests):
    return golden(name).backends["jax"].sample_actions(assemble(requests))


def test_the_soft_mask_is_the_papers():
    c = np.array([4, 3, 2, 1]) / 5
    fading = c * (np.exp(c) - 1) / (np.e - 1)
    np.testing.assert_allclose(realtime.soft_mask(10, 2, 4), [1, 1, *fading, 0, 0, 0, 0], atol=1e-7)
    np.testing.assert_array_equal(realtime.soft_mask(6, 3, 3), [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(realtime.soft_mask(4, 0, 4), np.zeros(4))
    assert realtime.soft_mask(4, 0, 1)[0] < 1  # without a delay nothing is certain
    np.testing.assert_array_equal(realtime.hard_mask(4, 3), [1, 1, 1, 0])


def test_the_guidance_is_the_papers():
    # Times 1, 0.75, 0.5 and 0.25; (t² + (1 - t)²) / (t (1 - t)), at most 5.
    np.testing.assert_allclose(realtime.guidance(4), [5, 0.625 / 0.1875, 2, 0.625 / 0.1875], rtol=1e-6)
    assert realtime.guidance(1) == [5]


@pytest.mark.parametrize("name", MODELS)
def test_the_guided_flow_is_gradient_descent_towards_the_previous_chunk(name):
    backend, request, actions = golden(name).backends["jax"], plain_request(name), previous_chunk(name)
    weights = realtime.soft_mask(len(actions), DELAY, EXECUTED)[:, None]
    inputs, schedule = backend.upload(assemble([request])), backend._schedule(STEPS)
    with jax.default_matmul_precision("highest"):
        context = model.prepare(backend.config, backend.weights, inputs)
        x = inputs.noise
        for i, t in enumerate(flow.timesteps(STEPS)):
            step = jax.tree.map(lambda rows, i=i: rows[i], schedule)

            def velocity(x, step=step):
                return model.velocity(backend.config, backend.weights, x, step, context)

            def distance(x, t=t, velocity=velocity):
                return jnp.sum(weights * (actions - (x - t * velocity(x))) ** 2) / 2

            r2 = t**2 / (t**2 + (1 - t) ** 2)
            strength = min(5.0, np.divide(t, (1 - t) * r2)) if t < 1 else 5.0
            x = x - (velocity(x) + strength * jax.grad(distance)(x)) / STEPS
    np.testing.assert_allclose(run(name, continued(request, Method.GUIDED, actions)), x, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_given_actions_are_at_the_end_of_the_flow_and_the_others_in_it(name):
    backend, request = golden(name).backends["jax"], plain_request(name)
    inputs = backend.upload(assemble([request]))
    context = model.prepare(backend.config, backend.weights, inputs)
    step = jax.tree.map(lambda rows: rows[1], backend._schedule(STEPS))
    for given, expected in ((True, backend._done), (False, step)):
        mask = jnp.full((1, len(request.noise), 1), given)
        committed = context._replace(committed=model.Committed(inputs.noise, mask, backend._done))
        found = model.velocity(backend.config, backend.weights, inputs.noise, step, committed)
        wanted = model.velocity(backend.config, backend.weights, inputs.noise, expected, context)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_is_given_the_first_actions_and_heeds_them(name):
    request, actions = plain_request(name), previous_chunk(name)
    found = run(name, continued(request, Method.TRAINED, actions))[0]
    np.testing.assert_array_equal(found[:DELAY], actions[:DELAY])
    others = run(name, continued(request, Method.TRAINED, actions + 1))[0]
    assert np.abs(others[DELAY:] - found[DELAY:]).max() > 1e-3
    # What comes after the delay is not looked at.
    rest_changed = actions + np.where(np.arange(len(actions)) < DELAY, 0, 1)[:, None].astype(np.float32)
    np.testing.assert_array_equal(run(name, continued(request, Method.TRAINED, rest_changed))[0], found)
    undelayed = run(name, continued(request, Method.TRAINED, actions, delay=0))
    np.testing.assert_allclose(undelayed, run(name, request), atol=1e-5)


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_batch_continue_their_own_chunks(name, method):
    actions = previous_chunk(name)
    first = continued(plain_request(name), method, actions)
    second = continued(dataclasses.replace(plain_request(name), noise=first.noise[::-1].copy()), method, -actions, 1)
    together = run(name, first, second)
    for row, request in zip(together, (first, second), strict=True):
        # Guidance multiplies roundings by Jacobians, step after step.
        np.testing.assert_allclose(row, run(name, request)[0], atol=2e-4 if method is Method.GUIDED else 2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_request_that_continues_nothing_gives_the_same_bits_as_ever(name):
    request, before = plain_request(name), run(name, plain_request(name))
    for method in Method:
        run(name, continued(request, method, previous_chunk(name)))
    np.testing.assert_array_equal(run(name, request), before)


@pytest.fixture(scope="module", params=Method)
def policy(request):
    sizes = model_config(json.loads((GOLDEN / "pi05_e2e/config.json").read_text()))
    config = dataclasses.replace(
        load_policy_config("pi05_droid"),
        model=sizes,
        tokenizer=GOLDEN / "tokenizer/tiny_visible.model",
        delta_action_mask=(7, -1),
        real_time_chunking=request.param,
    )
    options = {"precision": "float32", "device": "cpu", "real_time_chunking": True}
    return load_policy(config, GOLDEN / "pi05_e2e/checkpoint", **options)


def droid_observation(moved):
    return {
        "observation/exterior_image_1_left": np.full((180, 320, 3), 90 + round(50 * moved), np.uint8),
        "observation/wrist_image_left": np.full((224, 224, 3), 0.5, np.float32),
        "observation/joint_position": np.linspace(-1, 1, 7) + moved,
        "observation/gripper_position": np.array([0.5]),
    }


def test_the_new_chunk_takes_over_without_a_jump(policy):
    horizon, executed, delay = policy.config.model.action_horizon, 5, 3
    chunk = policy.infer(droid_observation(0), prompt="open", seed=1)["actions"]
    now = droid_observation(0.1)
    afresh = policy.infer(now, prompt="open", seed=2)["actions"]
    continuing = policy.infer(
        now,
        prompt="open",
        seed=2,
        previous_actions=chunk,
        inference_delay=delay,
        execution_horizon=executed,
    )["actions"]
    assert continuing.shape == (horizon, 8)
    old = chunk[executed:]

    def apart(new, steps):  # from where the old chunk would have led
        return np.abs(new[steps] - old[steps]).max()

    if policy.continues is Method.TRAINED:
        assert apart(continuing, slice(delay)) < 1e-6 * np.abs(old).max()
        return  # a random model has not been trained to go on smoothly
    assert apart(continuing, slice(delay)) < 0.15 * apart(afresh, slice(delay))
    assert apart(continuing, delay) < 0.5 * apart(afresh, delay)
