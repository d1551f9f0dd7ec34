"""DROID: a Franka arm with a Robotiq gripper, one outer and one wrist camera."""

from openpi_flash_models.robots.base import CameraEntry, Robot, StateEntry

DROID = Robot(
    name="droid",
    cameras=(
        CameraEntry("observation/exterior_image_1_left", "base_0_rgb"),
        CameraEntry("observation/wrist_image_left", "left_wrist_0_rgb"),
    ),
    state=(StateEntry("observation/joint_position", 7), StateEntry("observation/gripper_position", 1)),
    action_dim=8,
)
