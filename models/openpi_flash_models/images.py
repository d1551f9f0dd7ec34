"""Camera pictures: from what a robot sends to square 8-bit RGB of the model's size."""

import enum

import numpy as np
from PIL import Image

from openpi_flash_models.errors import InvalidObservationError

_FLOAT_TOLERANCE = 1e-3
"""How far float pixels may leave [0, 1]: interpolation overshoots a little, and less than a grey level is harmless."""


class ImageLayout(enum.StrEnum):
    """Axis orders that a robot's pictures may have. EITHER: channels first if the first axis has 3 elements."""

    HWC = "hwc"
    CHW = "chw"
    EITHER = "either"


def parse_image(value: np.ndarray, layout: ImageLayout, field: str) -> np.ndarray:
    """Checks one picture and returns it as uint8 RGB.

    Args:
        value: uint8, or floating point in [0, 1], which becomes `uint8(255 * value)`, truncated as openpi does.
        layout: axis orders to accept.
        field: name to use in errors.

    Returns:
        (height, width, 3) uint8; a view where nothing had to be converted.

    Raises:
        InvalidObservationError: not a picture of an accepted shape, dtype and range.
    """
    if value.ndim == 3 and value.size and value.shape[0] == 3 and layout is not ImageLayout.HWC:
        image = value.transpose(1, 2, 0)
    elif value.ndim == 3 and value.size and value.shape[2] == 3 and layout is not ImageLayout.CHW:
        image = value
    else:
        expected = {
            ImageLayout.HWC: "(height, width, 3)",
            ImageLayout.CHW: "(3, height, width)",
            ImageLayout.EITHER: "(height, width, 3) or (3, height, width)",
        }[layout]
        raise InvalidObservationError(field, f"expected an RGB picture of shape {expected}, got {value.shape}")
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f":
        raise InvalidObservationError(field, f"expected uint8, or floats in [0, 1], got {image.dtype}")
    low, high = float(image.min()), float(image.max())
    # Written so that NaN fails too.
    if not (low >= -_FLOAT_TOLERANCE and high <= 1 + _FLOAT_TOLERANCE):
        raise InvalidObservationError(field, f"expected floats in [0, 1], got values from {low:g} to {high:g}")
    return (255 * image).astype(np.uint8)


def resize_with_pad(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales pictures to fit and pads them with black, exactly as PIL's bilinear filter does.

    The aspect ratio is kept; the odd row or column of padding is at the bottom or at the right.

    Args:
        images: (..., h, w, 3) uint8.
        height: rows of the result.
        width: columns of the result.

    Returns:
        (..., height, width, 3) uint8; `images` itself where the size is right already.

    Raises:
        ValueError: a picture is so thin that nothing of it would be left.
    """
    if images.shape[-3:-1] == (height, width):
        return images
    out = np.empty((*images.shape[:-3], height, width, 3), np.uint8)
    flat_out = out.reshape(-1, height, width, 3)
    for image, target in zip(images.reshape(-1, *images.shape[-3:]), flat_out, strict=True):
        resize_into(image, target)
    return out


def resize_into(image: np.ndarray, out: np.ndarray) -> None:
    """`resize_with_pad` of one (h, w, 3) uint8 picture, of any strides, into an (H, W, 3) array.

    Raises:
        ValueError: the picture is so thin that nothing of it would be left.
    """
    h, w = image.shape[:2]
    height, width = out.shape[:2]
    planar = image.strides[2] > image.strides[1]  # channels first underneath
    if (h, w) == (height, width):
        if planar:
            # NumPy would copy three bytes at a time; by channel is five times as fast.
            for channel in range(3):
                out[..., channel] = image[..., channel]
        else:
            out[...] = image
        return
    ratio = max(w / width, h / height)
    new_h, new_w = int(h / ratio), int(w / ratio)
    if not (new_h and new_w):
        raise ValueError(f"a picture of {h}x{w} is too thin to be scaled to {height}x{width}")
    top, left = (height - new_h) // 2, (width - new_w) // 2
    if new_h != height or new_w != width:
        out[...] = 0
    inside = out[top : top + new_h, left : left + new_w]
    if planar:
        # PIL resizes channels independently, so single planes give the same bytes and need no interleaved copy.
        for channel in range(3):
            inside[..., channel] = _resize(image[..., channel], new_h, new_w)
    else:
        inside[...] = _resize(image, new_h, new_w)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
