"""A robot without code of its own: a configuration says which entries it sends, and nothing is converted."""

from collections import Counter

from openpi_flash_models.config import CAMERAS
from openpi_flash_models.robots.base import CameraEntry, Robot, StateEntry


def raw(cameras: tuple[CameraEntry, ...], state: tuple[StateEntry, ...], action_dim: int) -> Robot:
    """A robot whose state and actions the model sees in the robot's own units and order.

    Raises:
        ValueError: the table contradicts itself.
    """
    used = Counter(entry.camera for entry in cameras if entry.camera is not None)
    for camera, count in used.items():
        if camera not in CAMERAS:
            raise ValueError(f"no camera {camera!r} in the model; it has {', '.join(CAMERAS)}")
        if count > 1:
            raise ValueError(f"{count} pictures for the model's camera {camera!r}")
    if not any(entry.required and entry.camera for entry in cameras):
        raise ValueError("at least one camera must be required: no policy runs blind")
    robot = Robot("raw", cameras, state, action_dim)
    path, count = Counter(robot.paths).most_common(1)[0]
    if count > 1:
        raise ValueError(f"path {path!r} is named twice")
    return robot
