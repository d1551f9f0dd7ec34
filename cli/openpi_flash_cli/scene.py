"""Camera-like pictures drawn here, for demonstrations and timings where no camera is at hand."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

BLOCKS = (((200, 60, 50), 0.30, 0.62), ((60, 110, 190), 0.55, 0.70), ((220, 180, 70), 0.72, 0.58))


def camera_picture(view: int, step: int, *, height: int = 480, width: int = 640) -> np.ndarray:
    """A table with coloured blocks and a moving gripper, lit, blurred and grained as a camera would.

    Args:
        view: which camera; each sees the scene from another side.
        step: moment in time; the gripper moves with it.

    Returns:
        (height, width, 3) uint8, RGB.
    """
    picture = Image.new("RGB", (width, height), (118, 122, 128))
    draw = ImageDraw.Draw(picture)
    horizon = int(height * (0.34 + 0.06 * view))
    table = [(0, height), (width, height), (int(width * 0.9), horizon), (int(width * 0.1), horizon)]
    draw.polygon(table, (150, 112, 78))
    shift = 0.12 * (view - 1)
    for colour, x, y in BLOCKS:
        side = int(width * 0.07)
        left, top = int(width * (x + shift)), int(height * y)
        draw.ellipse([left - side // 4, top + side - 6, left + side + side // 3, top + side + 8], (110, 82, 58))
        draw.rectangle([left, top, left + side, top + side], colour)
        draw.rectangle([left, top, left + side, top + side // 4], tuple(min(255, c + 35) for c in colour))
    centre = width * (0.5 + shift + 0.18 * math.sin(step / 7))
    tip = height * (0.52 + 0.08 * math.cos(step / 5))
    draw.line([(centre, 0), (centre, tip)], (70, 72, 76), width=max(4, width // 24))
    for finger in (-1, 1):
        x = centre + finger * width * 0.03
        draw.line([(centre, tip), (x, tip + height * 0.05), (x, tip + height * 0.11)], (40, 42, 46), width=width // 64)
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(1.2)), np.float32)
    light = np.linspace(1.12, 0.82, width, dtype=np.float32)[None, :, None]
    grain = np.random.default_rng((view, step)).normal(0, 3, pixels.shape).astype(np.float32)
    return np.clip(pixels * light + grain, 0, 255).astype(np.uint8)
