"""Attention by a fused kernel is called with the right arguments, and only where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_flash_models.jax import attention

LENGTHS = jnp.array([9, 4], jnp.int32)


def random(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape, np.float32))


@pytest.mark.parametrize("lengths", [LENGTHS, None])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_the_fused_kernels_arguments_mean_the_same(num_kv_heads, lengths):
    # JAX's own attention, in place of cuDNN's behind the same function.
    q, keys, values = random(2, 9, 4, 8), random(2, 9, num_kv_heads, 8), random(2, 9, num_kv_heads, 8) + 1
    fused = attention.attend_fused(q, keys, values, lengths, "xla")
    by_einsum = attention.attend_by_einsum(q, keys, values, lengths)
    np.testing.assert_allclose(fused, by_einsum, atol=2e-6)


def test_what_lies_behind_the_length_does_not_count():
    q, keys, values = random(2, 9, 4, 8), random(2, 9, 1, 8), random(2, 9, 1, 8)
    usual = attention.attend_all(q, keys, values, LENGTHS)
    behind = jnp.arange(9)[None, :, None, None] >= LENGTHS[:, None, None, None]
    changed = attention.attend_all(q, jnp.where(behind, 7, keys), jnp.where(behind, 7, values), LENGTHS)
    np.testing.assert_array_equal(changed, usual)
    assert (attention.attend_all(q, keys, values, None) != usual).any()


def test_another_device_computes_as_ever_where_there_is_a_fused_kernel(monkeypatch):
    q, keys, values = random(2, 9, 4, 8), random(2, 9, 1, 8), random(2, 9, 1, 8)
    expected = jax.jit(attention.attend_by_einsum)(q, keys, values, LENGTHS)
    monkeypatch.setattr(attention, "is_fused", lambda *_: True)
    monkeypatch.setattr(attention, "attend_fused", functools.partial(attention.attend_fused, implementation="xla"))
    found = jax.jit(attention.attend_all)(q, keys, values, LENGTHS)
    np.testing.assert_array_equal(found, expected)


def test_a_fused_kernel_that_fails_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention.is_fused.cache_clear()
    assert not attention.is_fused((4, 8), 1, "float32")
    assert not caplog.text
    assert not attention.is_fused((4, 8), 1, "bfloat16")  # there is no cuDNN here
    assert "attention of 4 heads of 8 is not fused" in caplog.text
    attention.is_fused.cache_clear()
