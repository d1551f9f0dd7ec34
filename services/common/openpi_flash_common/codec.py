"""Tensors, images and observations between numpy and the wire. Every length is checked before it is believed."""

import io
import math
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from openpi_flash.v1 import types_pb2

from openpi_flash_common.errors import InvalidArgumentError

MAX_IMAGE_PIXELS = 1 << 25
"""Most pixels of one picture (33 million, an 8K frame). A picture is refused by its header, before it is decoded."""

_MAX_RANK = 32
_decoders = ThreadPoolExecutor(4, "decoder")
"""For the PNG pictures of one observation: a millisecond and more each, most of it without the interpreter's lock. A
JPEG takes a fifth of that, and is decoded sooner than another thread has begun."""

_DTYPES: dict[int, np.dtype] = {
    types_pb2.DTYPE_BOOL: np.dtype("?"),
    types_pb2.DTYPE_UINT8: np.dtype("u1"),
    types_pb2.DTYPE_INT8: np.dtype("i1"),
    types_pb2.DTYPE_UINT16: np.dtype("<u2"),
    types_pb2.DTYPE_INT16: np.dtype("<i2"),
    types_pb2.DTYPE_UINT32: np.dtype("<u4"),
    types_pb2.DTYPE_INT32: np.dtype("<i4"),
    types_pb2.DTYPE_UINT64: np.dtype("<u8"),
    types_pb2.DTYPE_INT64: np.dtype("<i8"),
    types_pb2.DTYPE_FLOAT16: np.dtype("<f2"),
    types_pb2.DTYPE_FLOAT32: np.dtype("<f4"),
    types_pb2.DTYPE_FLOAT64: np.dtype("<f8"),
}
_PROTO_DTYPES = {dtype.name: number for number, dtype in _DTYPES.items()} | {"bfloat16": types_pb2.DTYPE_BFLOAT16}


def tensor_to_proto(array: np.ndarray, field: str = "") -> types_pb2.Tensor:
    """Packs an array of any strides and byte order; the wire is C order, little-endian.

    Raises:
        InvalidArgumentError: the dtype has no counterpart on the wire (objects, strings, complex numbers, structures).
    """
    number = _PROTO_DTYPES.get(array.dtype.name)
    if number is None:
        raise InvalidArgumentError(
            f"{field or 'tensor'}: dtype {array.dtype} cannot be sent; one of {', '.join(_PROTO_DTYPES)} is expected",
            field,
        )
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return types_pb2.Tensor(dtype=number, shape=array.shape, data=array.tobytes())  # type: ignore[arg-type]


def tensor_from_proto(tensor: types_pb2.Tensor, field: str) -> np.ndarray:
    """Unpacks a tensor without copying: the array is a read-only view of the message's bytes.

    Raises:
        InvalidArgumentError: unknown dtype, or the number of bytes is not what shape and dtype ask for.
    """
    dtype = _bfloat16(field) if tensor.dtype == types_pb2.DTYPE_BFLOAT16 else _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidArgumentError(f"{field}: dtype {tensor.dtype} is not a known Dtype", field)
    if len(tensor.shape) > _MAX_RANK:
        raise InvalidArgumentError(f"{field}: {len(tensor.shape)} axes; at most {_MAX_RANK} are expected", field)
    shape, data = tuple(tensor.shape), tensor.data
    expected = math.prod(shape) * dtype.itemsize  # Python integers: no overflow
    if len(data) != expected:
        raise InvalidArgumentError(
            f"{field}: {len(data)} bytes; shape {shape} of {dtype.name} needs exactly {expected}", field
        )
    if dtype.kind == "b" and data.strip(b"\x00\x01"):  # such a byte would make a numpy bool behave unpredictably
        raise InvalidArgumentError(f"{field}: a bool that is neither 0 nor 1", field)
    try:
        return np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:  # no elements, and axes beyond what numpy can hold
        raise InvalidArgumentError(f"{field}: shape {shape} is too large", field) from error


def image_from_proto(image: types_pb2.Image, field: str) -> np.ndarray:
    """Unpacks or decodes one picture.

    Returns:
        (height, width, 3) uint8, RGB; for a raw picture a read-only view of the message's bytes.

    Raises:
        InvalidArgumentError: unknown encoding or layout, bytes that do not decode, or a size other than declared.
    """
    height, width = image.height, image.width
    if not height or not width:
        raise InvalidArgumentError(f"{field}: height {height} and width {width}; both must be positive", field)
    if height * width > MAX_IMAGE_PIXELS:
        raise InvalidArgumentError(
            f"{field}: {height}x{width} pixels; at most {MAX_IMAGE_PIXELS} are accepted in a picture", field
        )
    if image.encoding == types_pb2.IMAGE_ENCODING_RAW:
        return _raw_image(image, field)
    if image.encoding == types_pb2.IMAGE_ENCODING_JPEG:
        return _decode_jpeg(image.data, height, width, field)
    if image.encoding == types_pb2.IMAGE_ENCODING_PNG:
        return _decode_png(image.data, height, width, field)
    raise InvalidArgumentError(f"{field}: encoding {image.encoding} is not one of RAW, JPEG and PNG", field)


def observation_from_proto(
    observation: types_pb2.Observation, channels_first: Container[str] = ()
) -> tuple[dict[str, np.ndarray], str | None]:
    """Unpacks an observation into named arrays and its prompt (None when unset).

    Args:
        channels_first: names of pictures that are handed out as (3, height, width). A typed image knows its own axes;
            a robot's transform expects those that it documents.

    Raises:
        InvalidArgumentError: as tensor_from_proto and image_from_proto, or a name that is both a tensor and an image.
    """
    arrays = {name: tensor_from_proto(tensor, name) for name, tensor in observation.tensors.items()}
    images = dict(observation.images)
    num_slow = sum(image.encoding == types_pb2.IMAGE_ENCODING_PNG for image in images.values())
    decode = _decoders.map if num_slow > 1 else map
    for name, picture in zip(images, decode(image_from_proto, images.values(), images), strict=True):
        if name in arrays:
            raise InvalidArgumentError(f"{name}: sent both as a tensor and as an image; one is expected", name)
        arrays[name] = picture.transpose(2, 0, 1) if name in channels_first else picture
    return arrays, observation.prompt if observation.HasField("prompt") else None


class ImageSpec(Protocol):
    """What of a model's camera is sent; the layout is `chw`, `hwc` or `either`."""

    @property
    def path(self) -> str: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layout(self) -> str: ...
    @property
    def required(self) -> bool: ...


def image_specs_to_proto(specs: Iterable[ImageSpec]) -> list[types_pb2.ImageSpec]:
    """The cameras of a model, for its metadata."""
    return [
        types_pb2.ImageSpec(
            path=spec.path,
            height=spec.height,
            width=spec.width,
            layout=f"IMAGE_LAYOUT_{spec.layout.upper()}",
            dtype=types_pb2.DTYPE_UINT8,
            encoding=types_pb2.IMAGE_ENCODING_RAW,
            required=spec.required,
        )
        for spec in specs
    ]


def _raw_image(image: types_pb2.Image, field: str) -> np.ndarray:
    height, width, data = image.height, image.width, image.data
    if len(data) != height * width * 3:
        raise InvalidArgumentError(
            f"{field}: {len(data)} bytes; a raw {height}x{width} RGB picture needs exactly {height * width * 3}", field
        )
    pixels = np.frombuffer(data, np.uint8)
    if image.layout in (types_pb2.IMAGE_LAYOUT_UNSPECIFIED, types_pb2.IMAGE_LAYOUT_HWC):
        return pixels.reshape(height, width, 3)
    if image.layout == types_pb2.IMAGE_LAYOUT_CHW:
        return pixels.reshape(3, height, width).transpose(1, 2, 0)
    raise InvalidArgumentError(f"{field}: layout {image.layout} is not one of HWC and CHW", field)


def _decode_jpeg(data: bytes, height: int, width: int, field: str) -> np.ndarray:
    import simplejpeg  # services that pass pictures on untouched need no decoder

    try:
        found_height, found_width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size("JPEG", (found_height, found_width), (height, width), field)
        if colours not in ("YCbCr", "RGB"):
            raise InvalidArgumentError(f"{field}: the JPEG is not 8-bit RGB (mode {colours})", field)
        # The accurate ways of libjpeg, which are Pillow's as well: their pixels are the same. Damage is an error.
        return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False, strict=True)
    except ValueError as error:
        raise InvalidArgumentError(f"{field}: {len(data)} bytes that do not decode as JPEG: {error}", field) from error


def _decode_png(data: bytes, height: int, width: int, field: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:  # reads the header only
            _check_size("PNG", (picture.height, picture.width), (height, width), field)
            # Byte 24 is the bit depth; Pillow would quietly cut 16 bits to 8.
            if picture.mode != "RGB" or data[24] != 8:
                raise InvalidArgumentError(f"{field}: the PNG is not 8-bit RGB (mode {picture.mode})", field)
            return np.asarray(picture)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InvalidArgumentError(f"{field}: {len(data)} bytes that do not decode as PNG", field) from error


def _check_size(kind: str, found: tuple[int, int], declared: tuple[int, int], field: str) -> None:
    if found != declared:
        raise InvalidArgumentError(
            f"{field}: the {kind} is {found[0]}x{found[1]}, but {declared[0]}x{declared[1]} was declared", field
        )


def _bfloat16(field: str) -> np.dtype:
    try:
        import ml_dtypes
    except ImportError as error:
        raise InvalidArgumentError(f"{field}: this server cannot read bfloat16; send float32", field) from error
    return np.dtype(ml_dtypes.bfloat16)
