"""LIBERO: a simulated Franka arm, actions in end-effector space."""

from openpi_flash_models.robots.base import CameraEntry, Robot, StateEntry

LIBERO = Robot(
    name="libero",
    cameras=(
        CameraEntry("observation/image", "base_0_rgb"),
        CameraEntry("observation/wrist_image", "left_wrist_0_rgb"),
    ),
    state=(StateEntry("observation/state", 8),),
    action_dim=7,
)
