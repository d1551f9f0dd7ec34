"""What a policy and a planner take from an observation alike: entries by path, pictures, prompt and seed."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from openpi_flash_models.errors import InvalidObservationError
from openpi_flash_models.images import ImageLayout, resize_into
from openpi_flash_models.robots.base import Robot

MAX_PROMPT_CHARS = 10_000
"""Longest prompt, far above what the model reads: tokenizing is the one step whose cost the sender would set."""


class ImageSpec(NamedTuple):
    """What the model wants of one camera. `layout` is the documented axis order; `height` and `width` are the model's,
    and other sizes are resized."""

    path: str
    height: int
    width: int
    layout: ImageLayout
    required: bool


def image_specs(robot: Robot, size: int) -> tuple[ImageSpec, ...]:
    """The cameras of a robot that are used, in the model's order, for a model of this image size."""
    return tuple(
        ImageSpec(
            entry.path,
            size,
            size,
            ImageLayout.CHW if entry.layout is ImageLayout.CHW else ImageLayout.HWC,
            entry.required,
        )
        for entry in robot.used_cameras
    )


def flatten(observation: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """openpi's nested observation to entries by path: `{"images": {"cam_high": x}}` to `{"images/cam_high": x}`."""
    return dict(_leaves(observation, prefix))


class Resizer:
    """Brings pictures to the model's size, several at a time. Safe to share between threads.

    Attributes:
        size: height and width of the model's pictures.
    """

    def __init__(self, size: int, max_pictures: int) -> None:
        self.size = size
        self._threads = ThreadPoolExecutor(max_pictures, thread_name_prefix="resize")

    def __call__(self, pictures: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
        """Observation path and (h, w, 3) uint8 picture of each camera to (cameras, size, size, 3) uint8.

        Raises:
            InvalidObservationError: a picture is too thin to be scaled.
        """
        size = self.size
        images = np.empty((len(pictures), size, size, 3), np.uint8)

        def resize(view: int) -> None:
            path, image = pictures[view]
            try:
                resize_into(image, images[view])
            except ValueError as error:
                raise InvalidObservationError(path, str(error)) from error

        if all(image.shape[:2] == (size, size) for _, image in pictures):
            for view in range(len(images)):
                resize(view)
        else:
            # PIL works outside the interpreter's lock, some 2 ms for a camera of 640x480.
            list(self._threads.map(resize, range(len(images))))
        return images


def parse_prompt(prompt: object, default: str | None) -> str:
    """A request's prompt: text, UTF-8 bytes or a string array of one element; `default` where it is None.

    Raises:
        InvalidObservationError: none was given and there is no default; or it is no text, or too long.
    """
    if prompt is None:
        if default is None:
            raise InvalidObservationError("prompt", "required prompt is missing, and the policy has no default")
        return default
    if isinstance(prompt, np.ndarray) and prompt.size == 1 and prompt.dtype.kind in "US":
        prompt = prompt.item()
    try:
        if isinstance(prompt, bytes):
            prompt = prompt.decode("utf-8")
        elif isinstance(prompt, str):
            prompt.encode("utf-8")
    except UnicodeError as error:
        raise InvalidObservationError("prompt", f"expected text in UTF-8 ({error})") from error
    if not isinstance(prompt, str):
        kind = f"array of {prompt.dtype}" if isinstance(prompt, np.ndarray) else type(prompt).__name__
        raise InvalidObservationError("prompt", f"expected a string, got {kind}")
    if len(prompt) > MAX_PROMPT_CHARS:
        message = f"expected at most {MAX_PROMPT_CHARS} characters, got {len(prompt)}"
        raise InvalidObservationError("prompt", message)
    return prompt


def parse_seed(value: object) -> int:
    """A request's seed; raises InvalidObservationError where it is none."""
    seed = as_int(value)
    if seed is None or not 0 <= seed < 2**64:
        raise InvalidObservationError("seed", f"expected an integer from 0 to 2**64 - 1, got {value!r}")
    return seed


def as_int(value: Any) -> int | None:
    """The integer that this is, also one of NumPy's; None for what is none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _leaves(observation: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in observation.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
