"""ALOHA: two 6-joint arms with grippers. The model can be spared the hardware's conventions (`adapt_to_pi`)."""

import numpy as np

from openpi_flash_models.images import ImageLayout
from openpi_flash_models.robots.base import CameraEntry, Robot, StateEntry

_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2, np.float64)
"""Joints whose direction differs between ALOHA and the robots of the base models' training data."""

_GRIPPERS = [6, 13]

# Servo geometry of the gripper, metres: stroke of the fingers, horn and arm of the linkage.
_CLOSED, _OPEN = 0.01844, 0.058
_HORN, _ARM = 0.022, 0.036

# Ranges of the gripper's servo angle, radians: of the state in the training data, and of the robot's commands.
_ANGLE_MIN, _ANGLE_MAX = 0.5476, 1.6296
_COMMAND_MIN, _COMMAND_MAX = -0.6213, 1.4910


def aloha(*, adapt_to_pi: bool) -> Robot:
    """ALOHA, with `images/cam_*` as (3, height, width) and a `state` of 14.

    Args:
        adapt_to_pi: the model was trained on data converted to the base models' conventions.
    """
    chw = ImageLayout.CHW
    return Robot(
        name="aloha",
        cameras=(
            CameraEntry("images/cam_high", "base_0_rgb", chw),
            CameraEntry("images/cam_left_wrist", "left_wrist_0_rgb", chw, required=False),
            CameraEntry("images/cam_right_wrist", "right_wrist_0_rgb", chw, required=False),
            CameraEntry("images/cam_low", None, chw, required=False),
        ),
        state=(StateEntry("state", 14),),
        action_dim=14,
        encode_state=_encode_state if adapt_to_pi else None,
        decode_actions=_decode_actions if adapt_to_pi else None,
        encode_actions=_encode_actions if adapt_to_pi else None,
    )


def gripper_to_angular(opening: np.ndarray) -> np.ndarray:
    """Gripper state, 0 closed to 1 open, to the normalised servo angle of the training data."""
    stroke = opening * (_OPEN - _CLOSED) + _CLOSED
    cosine = (_HORN**2 + stroke**2 - _ARM**2) / (2 * _HORN * stroke)
    return (np.arcsin(np.clip(cosine, -1.0, 1.0)) - _ANGLE_MIN) / (_ANGLE_MAX - _ANGLE_MIN)


def gripper_from_angular(angle: np.ndarray) -> np.ndarray:
    """Gripper action of the model to the robot's command. Its ranges are others than `gripper_to_angular`'s."""
    return (angle + _ANGLE_MIN - _COMMAND_MIN) / (_COMMAND_MAX - _COMMAND_MIN)


def gripper_command_to_angular(command: np.ndarray) -> np.ndarray:
    """The inverse of `gripper_from_angular`."""
    return command * (_COMMAND_MAX - _COMMAND_MIN) + _COMMAND_MIN - _ANGLE_MIN


def _encode_state(state: np.ndarray) -> np.ndarray:
    state = state * _SIGNS
    state[_GRIPPERS] = gripper_to_angular(state[_GRIPPERS])
    return state


def _decode_actions(actions: np.ndarray) -> np.ndarray:
    actions = actions * _SIGNS
    actions[:, _GRIPPERS] = gripper_from_angular(actions[:, _GRIPPERS])
    return actions


def _encode_actions(actions: np.ndarray) -> np.ndarray:
    actions = actions * _SIGNS
    actions[:, _GRIPPERS] = gripper_command_to_angular(actions[:, _GRIPPERS])
    return actions
