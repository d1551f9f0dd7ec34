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
from openpi_flash_models.golden.compare import BACKENDS, GoldenModel, model_config
from openpi_flash_models.jax import model
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy_configs import load_policy_config
from openpi_flash_models.realtime import Continuation, Method
from openpi_flash_models.request import assemble

GOLDEN = Path(__file__).parents[2] / "tests/data/golden"
MODELS = ("pi0_a", "pi05_a")
STEPS = 4
DELAY, EXECUTED = 2, 3


@functools.cache
def golden(name):
    return GoldenModel(GOLDEN / name)


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


def run(name, *requests, backend="jax"):
    return golden(name).backends[backend].sample_actions(assemble(requests))


def prepared(name, inputs):
    backend = golden(name).backends["jax"]
    return jax.jit(model.prepare, static_argnums=0)(backend.config, backend.weights, inputs)


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

    @jax.jit
    def velocity_and_gradient(x, t, step, context):
        def velocity(x):
            return model.velocity(backend.config, backend.weights, x, step, context)

        def distance(x):
            return jnp.sum(weights * (actions - (x - t * velocity(x))) ** 2) / 2

        return velocity(x), jax.grad(distance)(x)

    with jax.default_matmul_precision("highest"):
        context = prepared(name, inputs)
        x = inputs.noise
        for i, t in enumerate(flow.timesteps(STEPS)):
            v, gradient = velocity_and_gradient(x, t, jax.tree.map(lambda rows, i=i: rows[i], schedule), context)
            r2 = t**2 / (t**2 + (1 - t) ** 2)
            strength = min(5.0, t / ((1 - t) * r2)) if t < 1 else 5.0
            x = x - (v + strength * gradient) / STEPS
    np.testing.assert_allclose(run(name, continued(request, Method.GUIDED, actions)), x, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_given_actions_are_at_the_end_of_the_flow_and_the_others_in_it(name):
    backend, request = golden(name).backends["jax"], plain_request(name)
    inputs = backend.upload(assemble([request]))
    context = prepared(name, inputs)
    velocity = jax.jit(functools.partial(model.velocity, backend.config, backend.weights))
    step = jax.tree.map(lambda rows: rows[1], backend._schedule(STEPS))
    for given, expected in ((True, backend._done), (False, step)):
        mask = jnp.full((1, len(request.noise), 1), given)
        committed = context._replace(committed=model.Committed(inputs.noise, mask, backend._done))
        found, wanted = velocity(inputs.noise, step, committed), velocity(inputs.noise, expected, context)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_is_given_the_first_actions_and_heeds_them(name, backend):
    request, actions = plain_request(name), previous_chunk(name)

    def run_trained(actions, delay=DELAY):
        return run(name, continued(request, Method.TRAINED, actions, delay), backend=backend)[0]

    found = run_trained(actions)
    np.testing.assert_array_equal(found[:DELAY], actions[:DELAY])
    assert np.abs(run_trained(actions + 1)[DELAY:] - found[DELAY:]).max() > 1e-3
    # What comes after the delay is not looked at.
    rest_changed = actions + np.where(np.arange(len(actions)) < DELAY, 0, 1)[:, None].astype(np.float32)
    np.testing.assert_array_equal(run_trained(rest_changed), found)
    np.testing.assert_allclose(run_trained(actions, delay=0), run(name, request, backend=backend)[0], atol=1e-5)


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("name", MODELS)
def test_both_backends_continue_alike(name, method):
    request = continued(plain_request(name), method, previous_chunk(name))
    # Guidance multiplies roundings by Jacobians, step after step.
    tolerance = 2e-4 if method is Method.GUIDED else 5e-5
    np.testing.assert_allclose(run(name, request, backend="torch"), run(name, request), atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_batch_continue_their_own_chunks(name, method, backend):
    actions = previous_chunk(name)
    first = continued(plain_request(name), method, actions)
    second = continued(dataclasses.replace(plain_request(name), noise=first.noise[::-1].copy()), method, -actions, 1)
    together = run(name, first, second, backend=backend)
    tolerance = 2e-4 if method is Method.GUIDED else 1e-4
    for row, request in zip(together, (first, second), strict=True):
        np.testing.assert_allclose(row, run(name, request, backend=backend)[0], atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_request_that_continues_nothing_gives_the_same_bits_as_ever(name, backend):
    request = plain_request(name)
    before = run(name, request, backend=backend)
    for method in Method:
        run(name, continued(request, method, previous_chunk(name)), backend=backend)
    np.testing.assert_array_equal(run(name, request, backend=backend), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", Method)
def test_bfloat16_continues_nearly_as_float32_does(method, backend):
    request = assemble([continued(plain_request("pi05_a"), method, previous_chunk("pi05_a"))])
    expected = golden("pi05_a").backends[backend].sample_actions(request).ravel()
    found = golden("pi05_a").load(backend, precision="bfloat16").sample_actions(request).ravel()
    assert found @ expected > 0.999 * np.linalg.norm(found) * np.linalg.norm(expected)


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
