"""Pictures: what is accepted, and resizing without surprises. Equality with openpi: golden/transforms_test.py."""

import numpy as np
import pytest
from PIL import Image

from openpi_flash_models.errors import InvalidObservationError
from openpi_flash_models.images import ImageLayout, parse_image, resize_into, resize_with_pad


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


def test_right_size_is_returned_untouched():
    images = picture(2, 32, 40, 3)
    assert resize_with_pad(images, 32, 40) is images


def test_padding_is_black_and_the_odd_row_is_at_the_bottom():
    out = resize_with_pad(np.full((10, 20, 3), 255, np.uint8), 11, 10)
    assert out[3:8].min() == 255
    assert out[:3].max() == out[8:].max() == 0


def test_resizing_is_pils_bilinear():
    image = picture(60, 80, 3)
    expected = np.asarray(Image.fromarray(image).resize((40, 30), Image.Resampling.BILINEAR))
    out = resize_with_pad(image, 40, 40)
    np.testing.assert_array_equal(out[5:35], expected)


@pytest.mark.parametrize("size", [(48, 64), (37, 29), (32, 32)])
def test_channels_first_underneath_gives_the_same_bytes(size):
    planes = picture(3, *size)
    out = np.empty((32, 32, 3), np.uint8)
    resize_into(planes.transpose(1, 2, 0), out)
    np.testing.assert_array_equal(out, resize_with_pad(np.ascontiguousarray(planes.transpose(1, 2, 0)), 32, 32))


def test_a_picture_too_thin_to_scale_is_refused():
    with pytest.raises(ValueError, match="1x500 is too thin"):
        resize_with_pad(picture(1, 500, 3), 32, 32)


def test_uint8_is_not_copied():
    image = picture(6, 8, 3)
    assert parse_image(image, ImageLayout.EITHER, "x") is image
    planes = picture(3, 6, 8)
    assert np.shares_memory(parse_image(planes, ImageLayout.CHW, "x"), planes)


def test_floats_are_truncated_to_bytes():
    image = np.array([0.0, 0.5, 0.999, 1.0], np.float32)[:, None, None] * np.ones((4, 1, 3), np.float32)
    np.testing.assert_array_equal(parse_image(image, ImageLayout.HWC, "x")[:, 0, 0], [0, 127, 254, 255])


def test_channels_first_wins_where_both_orders_fit():
    assert parse_image(picture(3, 5, 3), ImageLayout.EITHER, "x").shape == (5, 3, 3)
    assert parse_image(picture(3, 5, 3), ImageLayout.HWC, "x").shape == (3, 5, 3)


@pytest.mark.parametrize(
    ("value", "layout", "message"),
    [
        (picture(6, 8, 3), ImageLayout.CHW, r"shape \(3, height, width\), got \(6, 8, 3\)"),
        (picture(3, 6, 8), ImageLayout.HWC, r"shape \(height, width, 3\), got \(3, 6, 8\)"),
        (picture(6, 8, 4), ImageLayout.EITHER, r"or \(3, height, width\), got \(6, 8, 4\)"),
        (picture(6, 8), ImageLayout.EITHER, r"got \(6, 8\)"),
        (picture(0, 8, 3), ImageLayout.EITHER, r"got \(0, 8, 3\)"),
        (picture(6, 8, 3).astype(np.int64), ImageLayout.EITHER, "expected uint8, or floats in .*, got int64"),
        (np.full((6, 8, 3), "a"), ImageLayout.EITHER, "expected uint8"),
        (np.full((6, 8, 3), np.nan), ImageLayout.EITHER, "from nan to nan"),
        (np.full((6, 8, 3), 200.0), ImageLayout.EITHER, "from 200 to 200"),
        (np.full((6, 8, 3), -1.0), ImageLayout.EITHER, "from -1 to -1"),
    ],
)
def test_what_is_no_picture_is_refused(value, layout, message):
    with pytest.raises(InvalidObservationError, match=message) as caught:
        parse_image(value, layout, "images/cam_high")
    assert caught.value.field == "images/cam_high"
