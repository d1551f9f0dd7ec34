"""What a robot is to a policy: a table of its observation entries, and maps between its units and the model's."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from openpi_flash_models.config import CAMERAS
from openpi_flash_models.errors import InvalidObservationError
from openpi_flash_models.images import ImageLayout, parse_image


@dataclasses.dataclass(frozen=True)
class CameraEntry:
    """One picture of an observation.

    Attributes:
        path: its name, e.g. `images/cam_high`.
        camera: the model's camera that it becomes; None: accepted from robots that send it, and not used.
        layout: axis orders to accept.
        required: false where the policy runs without it.
    """

    path: str
    camera: str | None
    layout: ImageLayout = ImageLayout.EITHER
    required: bool = True


@dataclasses.dataclass(frozen=True)
class StateEntry:
    """One numeric vector of an observation; the state is all of them, one after the other.

    Attributes:
        path: its name, e.g. `observation/joint_position`.
        dim: its length. A vector of length 1 may be sent as a scalar.
    """

    path: str
    dim: int


@dataclasses.dataclass(frozen=True, eq=False)
class RobotInputs:
    """A checked observation.

    Attributes:
        images: observation path and (h, w, 3) uint8 picture of each camera that was sent, in the model's order.
        state: (state_dim,) float64, in the units that the model was trained with.
    """

    images: list[tuple[str, np.ndarray]]
    state: np.ndarray


@dataclasses.dataclass(frozen=True)
class Robot:
    """A kind of robot. Values, no behaviour of its own beyond parsing.

    Attributes:
        name: `aloha`, `droid`, `libero` or `raw`.
        cameras: pictures it sends.
        state: vectors it sends.
        action_dim: width of its actions: the first so many dimensions of the model's.
        encode_state: (state_dim,) float64 in the robot's units to the units of the training data.
        decode_actions: (horizon, action_dim) float64 in the units of the training data to the robot's.
        encode_actions: its inverse; there where `decode_actions` is.
    """

    name: str
    cameras: tuple[CameraEntry, ...]
    state: tuple[StateEntry, ...]
    action_dim: int
    encode_state: Callable[[np.ndarray], np.ndarray] | None = None
    decode_actions: Callable[[np.ndarray], np.ndarray] | None = None
    encode_actions: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        # Prefix order is the model's camera order, whatever the table's.
        order = {camera: i for i, camera in enumerate(CAMERAS)}
        in_order = sorted(self.cameras, key=lambda entry: order.get(entry.camera or "", len(order)))
        object.__setattr__(self, "cameras", tuple(in_order))

    @functools.cached_property
    def paths(self) -> list[str]:
        """Every entry that an observation may have."""
        return [camera.path for camera in self.cameras] + [vector.path for vector in self.state]

    @property
    def state_dim(self) -> int:
        """Length of the whole state."""
        return sum(entry.dim for entry in self.state)

    @property
    def used_cameras(self) -> tuple[CameraEntry, ...]:
        """Pictures that reach the model, in its order."""
        return tuple(entry for entry in self.cameras if entry.camera is not None)

    @property
    def view_counts(self) -> range:
        """Numbers of cameras that a valid observation can have."""
        used = self.used_cameras
        return range(sum(entry.required for entry in used), len(used) + 1)

    def parse(self, observation: Mapping[str, np.ndarray]) -> RobotInputs:
        """Checks an observation's entries and takes them apart.

        Raises:
            InvalidObservationError: an entry is missing, unknown, or of the wrong shape, dtype or range.
        """
        images = self._pictures(observation)
        vectors = []
        for entry in self.state:
            value = observation.get(entry.path)
            if value is None:
                raise _missing(entry.path, f"{entry.dim} numbers", observation)
            vectors.append(_parse_vector(_as_array(value, entry.path), entry))
        self._refuse_unknown(observation)
        state = np.concatenate(vectors) if len(vectors) > 1 else vectors[0]
        return RobotInputs(images, self.encode_state(state) if self.encode_state else state)

    def parse_images(self, observation: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
        """The pictures alone, as `RobotInputs` has them. The state may be absent, and is not looked at.

        Raises:
            InvalidObservationError: a picture is missing or malformed, or an entry is none of this robot's.
        """
        images = self._pictures(observation)
        self._refuse_unknown(observation)
        return images

    def decode(self, actions: np.ndarray) -> np.ndarray:
        """(horizon, ≥ action_dim) float64 in the units of the training data to (horizon, action_dim) in the robot's."""
        actions = actions[:, : self.action_dim]
        return self.decode_actions(actions) if self.decode_actions else actions

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """(horizon, action_dim) float64 in the robot's units to those of the training data: the inverse of `decode`."""
        return self.encode_actions(actions) if self.encode_actions else actions

    def _pictures(self, observation: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
        images = []
        for camera in self.cameras:
            value = observation.get(camera.path)
            if value is None:
                if camera.required:
                    raise _missing(camera.path, "camera", observation)
                continue
            image = parse_image(_as_array(value, camera.path), camera.layout, camera.path)
            if camera.camera is not None:
                images.append((camera.path, image))
        return images

    def _refuse_unknown(self, observation: Mapping[str, np.ndarray]) -> None:
        for path in observation:
            if path not in self.paths:
                raise InvalidObservationError(path, f"unknown entry{did_you_mean(path, self.paths)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the nearest known name, or a list of all where none is near."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean `{nearest[0]}`?" if nearest else f"; known: {', '.join(names)}"


def _missing(path: str, what: str, observation: Mapping[str, np.ndarray]) -> InvalidObservationError:
    sent = ", ".join(observation) or "nothing"
    return InvalidObservationError(path, f"required {what} is missing; the observation has {sent}")


def _as_array(value: object, path: str) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InvalidObservationError(path, f"expected an array ({error})") from error


def _parse_vector(value: np.ndarray, entry: StateEntry) -> np.ndarray:
    if value.dtype.kind not in "iuf" and value.dtype != ml_dtypes.bfloat16:
        raise InvalidObservationError(entry.path, f"expected real numbers, got dtype {value.dtype}")
    if value.shape != (entry.dim,) and not (entry.dim == 1 and value.shape == ()):
        raise InvalidObservationError(entry.path, f"expected shape {(entry.dim,)}, got {value.shape}")
    vector = np.array(value, np.float64, ndmin=1)
    if not np.isfinite(vector).all():
        bad = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise InvalidObservationError(entry.path, f"expected finite numbers, element {bad} is {vector[bad]}")
    return vector
