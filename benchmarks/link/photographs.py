"""Real photographs as camera pictures: how far pictures compress, and so what a link has to carry, depends on them."""

import io
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache/link/photographs"
NAMES = ("astronaut.png", "coffee.png", "chelsea.png")
MARGIN = 32
"""Pixels by which a photograph is larger than a camera's picture, which is a part of it that moves."""


def load(height: int, width: int) -> np.ndarray:
    """
    Returns:
        (3, height + MARGIN, width + MARGIN, 3) uint8, RGB: three photographs.
    """
    folder = _fetch()
    return np.stack([_scaled(Image.open(folder / name), height + MARGIN, width + MARGIN) for name in NAMES])


def views(photographs: np.ndarray, step: int) -> list[np.ndarray]:
    """What the cameras see at a moment: each another part, moved a little from the moment before.

    Returns:
        Three arrays (height, width, 3) uint8.
    """
    height, width = photographs.shape[1] - MARGIN, photographs.shape[2] - MARGIN
    top, left = step * 5 % (MARGIN + 1), step * 3 % (MARGIN + 1)
    return [np.ascontiguousarray(photograph[top : top + height, left : left + width]) for photograph in photographs]


def jpeg_bytes(pictures: Iterable[np.ndarray], quality: int, subsampling: str) -> int:
    """Bytes of pictures as JPEG."""
    total = 0
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=subsampling)
        total += len(file.getvalue())
    return total


def _fetch() -> Path:
    folder = CACHE / "skimage/data"
    if not all((folder / name).exists() for name in NAMES):
        uv = shutil.which("uv") or HERE.parents[1] / ".cache/uv/bin/uv"
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--target", CACHE, "-r", HERE / "photographs.txt"]
        subprocess.run(command, check=True)
    return folder


def _scaled(image: Image.Image, height: int, width: int) -> np.ndarray:
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    scaled = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(scaled.crop((left, top, left + width, top + height)))
