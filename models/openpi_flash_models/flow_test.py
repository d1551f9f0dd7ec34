"""The flow's clock: times as openpi accumulates them, and their embedding."""

import numpy as np
import pytest

from openpi_flash_models import flow


@pytest.mark.parametrize("num_steps", [1, 2, 4, 7, 10, 50, 100])
def test_times_are_accumulated_in_float32(num_steps):
    dt, time, expected = np.float32(-1.0 / num_steps), np.float32(1), []
    while time >= -dt / 2:
        expected.append(time)
        time = np.float32(time + dt)
    times = flow.timesteps(num_steps)
    assert times.dtype == np.float32
    assert times.tolist() == expected
    assert flow.step_size(num_steps) == dt


def test_ten_steps_are_not_multiples_of_a_tenth():
    times = flow.timesteps(10)
    assert times[1] == np.float32(0.899999976)
    assert times[9] != np.float32(0.1)


def test_embedding_is_sines_then_cosines_of_periods_from_4_ms_to_4_s():
    embedding = flow.time_embedding(np.array([0.5, 0.001], np.float32), 8)
    assert embedding.dtype == np.float32
    periods = [0.004, 0.04, 0.4, 4]
    for row, time in zip(embedding, (np.float32(0.5), np.float32(0.001)), strict=True):
        angles = [2 * np.pi * float(time) / period for period in periods]
        np.testing.assert_allclose(row, [*np.sin(angles), *np.cos(angles)], atol=1e-7)
