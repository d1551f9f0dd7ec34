"""Which pictures of an observation are prepared for the server before they travel, and what becomes of them.

The server's metadata say how it wants each camera's pictures: scaled to the model's size, and raw, PNG or JPEG. They
are made so in Rust, by the package openpi-flash-transport; without it every picture is sent as it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from openpi_flash.v1 import types_pb2

if TYPE_CHECKING:
    from openpi_flash_transport import Picture

try:
    import openpi_flash_transport as extension
    from openpi_flash_transport import PictureError
except ImportError:  # the optional dependency of the extra `quic`
    extension = None  # type: ignore[assignment]

    class PictureError(Exception):  # type: ignore[no-redef]
        """Never raised."""


__all__ = ["CameraSpec", "Cameras", "PictureError", "pick", "prepare", "read_cameras"]

_ENCODINGS = {
    types_pb2.IMAGE_ENCODING_LOSSLESS: "lossless",
    types_pb2.IMAGE_ENCODING_RAW: "raw",
    types_pb2.IMAGE_ENCODING_PNG: "png",
    types_pb2.IMAGE_ENCODING_JPEG: "jpeg",
}
_DTYPES = {np.dtype(np.uint8), np.dtype(np.float32), np.dtype(np.float64)}


class CameraSpec(NamedTuple):
    """What the server wants of one camera. `channels_first`: its pictures are (3, height, width) and nothing else."""

    camera: "extension.Camera"
    channels_first: bool


Cameras = Mapping[str, CameraSpec]
"""By name in the observation."""


def read_cameras(specs: Iterable[types_pb2.ImageSpec]) -> Cameras:
    """The cameras whose pictures can be prepared; those that ask for something newer than this client are left out."""
    cameras: dict[str, CameraSpec] = {}
    for spec in specs if extension is not None else ():
        encoding = _ENCODINGS.get(spec.encoding, "")
        try:
            camera = extension.Camera(spec.height, spec.width, encoding, spec.jpeg_quality, spec.jpeg_subsampling)
        except (ValueError, OverflowError):
            continue
        cameras[spec.path] = CameraSpec(camera, spec.layout == types_pb2.IMAGE_LAYOUT_CHW)
    return cameras


def pick(name: str, value: Any, spec: CameraSpec) -> "Picture | None":
    """The picture that `value` is; None where it is none that the server would take: it will say what is wrong."""
    if not isinstance(value, np.ndarray) or value.ndim != 3 or value.dtype not in _DTYPES:
        return None
    first, last = value.shape[0] == 3, value.shape[2] == 3
    channels_first = first and (spec.channels_first or not last)
    if not channels_first and (first or not last or spec.channels_first):
        return None
    if not value.flags.c_contiguous:
        # Often a transposed view: then the memory is a picture, too.
        other = value.transpose(1, 2, 0) if channels_first else value.transpose(2, 0, 1)
        if other.flags.c_contiguous:
            value, channels_first = other, not channels_first
        else:
            value = np.ascontiguousarray(value)
    return name, value, channels_first, spec.camera


def prepare(pictures: "Sequence[Picture]") -> bytes:
    """Serialized InferRequest fields that hold the pictures.

    Raises:
        PictureError: a picture that cannot be prepared: its name, and why.
    """
    return extension.prepare(pictures)
