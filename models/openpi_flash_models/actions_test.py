"""Delta and absolute actions. Equality with openpi's numbers: golden/transforms_test.py."""

import numpy as np

from openpi_flash_models.actions import make_mask, to_absolute, to_delta


def test_mask_expands_runs():
    assert make_mask((2, -1, 1)).tolist() == [True, True, False, True]


def test_every_step_is_relative_to_the_state_at_the_chunks_start():
    state = np.array([10.0, 20.0, 30.0])
    chunk = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    absolute = to_absolute(chunk, state, make_mask((1, -1, 1)))
    assert absolute.tolist() == [[11, 2, 33, 4], [15, 6, 37, 8]]
    assert chunk[0, 0] == 1
    np.testing.assert_array_equal(to_delta(absolute, state, make_mask((1, -1, 1))), chunk)
