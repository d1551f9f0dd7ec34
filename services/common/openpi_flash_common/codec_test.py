"""Tensors and pictures survive the wire; bytes that do not fit what they claim are refused by name."""

import io

import ml_dtypes
import numpy as np
import pytest
from openpi_flash.v1 import types_pb2
from PIL import Image

from openpi_flash_common.codec import (
    MAX_IMAGE_PIXELS,
    image_from_proto,
    observation_from_proto,
    tensor_from_proto,
    tensor_to_proto,
)
from openpi_flash_common.errors import InvalidArgumentError

DTYPES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ml_dtypes.bfloat16]
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), np.uint8)


def encode(pixels: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 4), (5, 1)])
def test_round_trip_of_every_dtype_and_shape(dtype, shape):
    array = RNG.integers(0, 2 if dtype == "?" else 100, shape).astype(dtype)
    tensor = types_pb2.Tensor.FromString(tensor_to_proto(array).SerializeToString())
    back = tensor_from_proto(tensor, "x")
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert not back.flags.writeable


@pytest.mark.parametrize("make", [np.asfortranarray, lambda a: a[::-1, ::2], lambda a: a.T, lambda a: a.astype(">f4")])
def test_strides_and_byte_order_do_not_matter(make):
    array = make(np.arange(24, dtype=np.float32).reshape(4, 6))
    back = tensor_from_proto(tensor_to_proto(array), "x")
    np.testing.assert_array_equal(back, array)
    assert back.dtype == np.dtype("<f4")


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.zeros(2, complex), np.zeros(1, "M8[s]")])
def test_dtypes_without_a_counterpart_are_refused(array):
    with pytest.raises(InvalidArgumentError, match="state: dtype") as caught:
        tensor_to_proto(array, "state")
    assert caught.value.field == "state"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (types_pb2.Tensor(shape=[1], data=b"1"), "dtype 0"),
        (types_pb2.Tensor(dtype=99, shape=[1], data=b"1"), "dtype 99"),
        (types_pb2.Tensor(dtype=types_pb2.DTYPE_FLOAT32, shape=[3], data=b"1234"), r"4 bytes.*exactly 12"),
        (types_pb2.Tensor(dtype=types_pb2.DTYPE_FLOAT32, shape=[], data=b""), "exactly 4"),
        (types_pb2.Tensor(dtype=types_pb2.DTYPE_UINT8, shape=[2**32 - 1] * 4, data=b""), "exactly"),
        # 2**64 elements: zero in 64-bit arithmetic.
        (
            types_pb2.Tensor(dtype=types_pb2.DTYPE_UINT8, shape=[2**31, 2**31, 4], data=b""),
            "exactly 18446744073709551616",
        ),
        (types_pb2.Tensor(dtype=types_pb2.DTYPE_UINT8, shape=[0] + [2**32 - 1] * 3, data=b""), "too large"),
        (types_pb2.Tensor(dtype=types_pb2.DTYPE_UINT8, shape=[1] * 33, data=b"1"), "33 axes"),
        (types_pb2.Tensor(dtype=types_pb2.DTYPE_BOOL, shape=[3], data=b"\0\2\1"), "neither 0 nor 1"),
    ],
)
def test_tensors_that_lie_are_refused(tensor, message):
    with pytest.raises(InvalidArgumentError, match=f"^state: .*{message}") as caught:
        tensor_from_proto(tensor, "state")
    assert caught.value.field == "state"


def test_raw_pictures_of_both_layouts():
    hwc = types_pb2.Image(encoding=types_pb2.IMAGE_ENCODING_RAW, height=12, width=20, data=PIXELS.tobytes())
    chw = types_pb2.Image(
        encoding=types_pb2.IMAGE_ENCODING_RAW,
        layout=types_pb2.IMAGE_LAYOUT_CHW,
        height=12,
        width=20,
        data=PIXELS.transpose(2, 0, 1).tobytes(),
    )
    for image in (hwc, chw):
        np.testing.assert_array_equal(image_from_proto(image, "cam"), PIXELS)


@pytest.mark.parametrize("options", [{}, {"interlace": 1}, {"compress_level": 0}])
def test_png_loses_nothing(options):
    data = encode(PIXELS, "PNG", **options)
    image = types_pb2.Image(encoding=types_pb2.IMAGE_ENCODING_PNG, height=12, width=20, data=data)
    np.testing.assert_array_equal(image_from_proto(image, "cam"), PIXELS)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 95, "optimize": True}])
def test_jpeg_decodes_as_pillow_does(options, subsampling):
    pixels = RNG.integers(0, 256, (37, 61, 3), np.uint8)
    data = encode(pixels, "JPEG", subsampling=subsampling, **options)
    image = types_pb2.Image(encoding=types_pb2.IMAGE_ENCODING_JPEG, height=37, width=61, data=data)
    np.testing.assert_array_equal(image_from_proto(image, "cam"), np.asarray(Image.open(io.BytesIO(data))))


def test_jpeg_may_keep_red_green_and_blue():
    data = encode(PIXELS, "JPEG", quality=100, keep_rgb=True)
    image = types_pb2.Image(encoding=types_pb2.IMAGE_ENCODING_JPEG, height=12, width=20, data=data)
    np.testing.assert_allclose(image_from_proto(image, "cam").astype(int), PIXELS, atol=2)


def png_bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels and whose file is a few bytes."""
    data = bytearray(encode(PIXELS, "PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    return bytes(data)


def jpeg_bomb() -> bytes:
    """A JPEG whose header promises the most pixels that one can have."""
    data = bytearray(encode(PIXELS, "JPEG"))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = (65_500).to_bytes(2, "big") * 2
    return bytes(data)


RAW, JPEG, PNG = types_pb2.IMAGE_ENCODING_RAW, types_pb2.IMAGE_ENCODING_JPEG, types_pb2.IMAGE_ENCODING_PNG


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"encoding": 0, "data": PIXELS.tobytes()}, "encoding 0"),
        ({"encoding": 77, "data": PIXELS.tobytes()}, "encoding 77"),
        ({"encoding": RAW, "data": PIXELS.tobytes(), "layout": 9}, "layout 9"),
        ({"encoding": RAW, "data": PIXELS.tobytes()[:-1]}, "719 bytes.*exactly 720"),
        ({"encoding": RAW, "height": 0, "data": b""}, "must be positive"),
        ({"encoding": RAW, "height": 2**32 - 1, "width": 2**32 - 1, "data": b""}, f"at most {MAX_IMAGE_PIXELS}"),
        ({"encoding": JPEG, "data": encode(PIXELS, "PNG")}, "do not decode as JPEG"),
        ({"encoding": PNG, "data": encode(PIXELS, "JPEG")}, "do not decode as PNG"),
        ({"encoding": JPEG, "data": encode(PIXELS, "JPEG")[:200]}, "do not decode as JPEG"),
        ({"encoding": JPEG, "data": encode(PIXELS, "JPEG")[:-30]}, "do not decode as JPEG: Premature end"),
        ({"encoding": JPEG, "data": jpeg_bomb()}, "65500x65500, but 12x20 was declared"),
        ({"encoding": PNG, "data": encode(PIXELS, "PNG")[:100]}, "do not decode as PNG"),
        ({"encoding": PNG, "data": b""}, "do not decode as PNG"),
        (
            {"encoding": JPEG, "height": 20, "width": 12, "data": encode(PIXELS, "JPEG")},
            "12x20, but 20x12 was declared",
        ),
        ({"encoding": JPEG, "data": encode(PIXELS[..., 0], "JPEG")}, "not 8-bit RGB"),
        ({"encoding": JPEG, "data": encode(PIXELS, "JPEG", mode="CMYK")}, "not 8-bit RGB"),
        ({"encoding": PNG, "data": encode(np.dstack([PIXELS, PIXELS[..., :1]]), "PNG")}, "not 8-bit RGB"),
        ({"encoding": PNG, "data": png_bomb(5_000)}, "declared|do not decode"),
        ({"encoding": PNG, "data": png_bomb(100_000)}, "do not decode"),
    ],
)
def test_pictures_that_lie_are_refused(image, message):
    with pytest.raises(InvalidArgumentError, match=f"^images/cam: .*({message})") as caught:
        image_from_proto(types_pb2.Image(**{"height": 12, "width": 20, **image}), "images/cam")
    assert caught.value.field == "images/cam"


def test_damaged_pictures_are_refused_or_decoded_never_fatal():
    files = {JPEG: encode(PIXELS, "JPEG"), PNG: encode(PIXELS, "PNG")}
    refused = 0
    for encoding, file in files.items():
        for _ in range(300):
            data = bytearray(file)
            data[RNG.integers(len(data))] ^= int(RNG.integers(1, 256))
            try:
                image = types_pb2.Image(encoding=encoding, height=12, width=20, data=bytes(data))
                assert image_from_proto(image, "cam").shape == (12, 20, 3)
            except InvalidArgumentError:
                refused += 1
    assert refused > 100


def test_coded_pictures_keep_their_names_and_their_faults():
    observation = types_pb2.Observation()
    pictures = {f"images/cam{i}": np.roll(PIXELS, i, axis=0) for i in range(6)}
    for name, pixels in pictures.items():
        image = types_pb2.Image(encoding=PNG, height=12, width=20, data=encode(pixels, "PNG"))
        observation.images[name].CopyFrom(image)
    arrays, _ = observation_from_proto(observation)
    for name, pixels in pictures.items():
        np.testing.assert_array_equal(arrays[name], pixels)

    observation.images["images/cam3"].data = b"PNG"
    with pytest.raises(InvalidArgumentError, match=r"^images/cam3: 3 bytes that do not decode as PNG"):
        observation_from_proto(observation)


def test_observation():
    observation = types_pb2.Observation(prompt="pick up the fork")
    observation.tensors["state"].CopyFrom(tensor_to_proto(np.arange(3.0)))
    observation.images["images/cam"].CopyFrom(types_pb2.Image(encoding=RAW, height=12, width=20, data=PIXELS.tobytes()))
    arrays, prompt = observation_from_proto(observation)
    assert prompt == "pick up the fork"
    assert set(arrays) == {"state", "images/cam"}
    np.testing.assert_array_equal(arrays["state"], np.arange(3.0))

    observation.ClearField("prompt")
    assert observation_from_proto(observation)[1] is None

    observation.tensors["images/cam"].CopyFrom(tensor_to_proto(PIXELS))
    with pytest.raises(InvalidArgumentError, match="both as a tensor and as an image"):
        observation_from_proto(observation)
