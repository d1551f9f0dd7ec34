"""Robots: what they must send, and the errors that say so. Equality with openpi: golden/transforms_test.py."""

import ml_dtypes
import numpy as np
import pytest

from openpi_flash_models.errors import InvalidObservationError
from openpi_flash_models.images import ImageLayout
from openpi_flash_models.robots.aloha import aloha, gripper_to_angular
from openpi_flash_models.robots.base import CameraEntry, StateEntry
from openpi_flash_models.robots.droid import DROID
from openpi_flash_models.robots.libero import LIBERO
from openpi_flash_models.robots.raw import raw

HWC = np.zeros((6, 8, 3), np.uint8)
CHW = np.zeros((3, 6, 8), np.uint8)

ALOHA = aloha(adapt_to_pi=False)
OBSERVATIONS = {
    "aloha": {"images/cam_high": CHW, "images/cam_right_wrist": CHW, "state": np.arange(14.0)},
    "droid": {
        "observation/exterior_image_1_left": HWC,
        "observation/wrist_image_left": CHW,
        "observation/joint_position": np.arange(7, dtype=np.float32),
        "observation/gripper_position": np.array([7.0]),
    },
    "libero": {"observation/image": HWC, "observation/wrist_image": HWC, "observation/state": np.arange(8.0)},
}
ROBOTS = {"aloha": ALOHA, "droid": DROID, "libero": LIBERO}


@pytest.mark.parametrize("name", ROBOTS)
def test_a_valid_observation_gives_pictures_and_state(name):
    inputs = ROBOTS[name].parse(OBSERVATIONS[name])
    assert [image.shape for _, image in inputs.images] == [(6, 8, 3)] * 2
    np.testing.assert_array_equal(inputs.state, np.arange(ROBOTS[name].state_dim))
    assert inputs.state.dtype == np.float64


def test_aloha_keeps_the_models_camera_order_and_drops_cam_low():
    observation = {"images/cam_low": CHW, "images/cam_right_wrist": CHW, "images/cam_left_wrist": CHW}
    inputs = ALOHA.parse({**OBSERVATIONS["aloha"], **observation})
    paths = [path for path, _ in inputs.images]
    assert paths == ["images/cam_high", "images/cam_left_wrist", "images/cam_right_wrist"]
    assert list(ALOHA.view_counts) == [1, 2, 3]


def test_droid_gripper_may_be_a_scalar():
    for gripper in (np.float64(7), np.array(7.0), 7.0, 7, np.array([7], np.int8)):
        inputs = DROID.parse({**OBSERVATIONS["droid"], "observation/gripper_position": gripper})
        assert inputs.state[7] == 7


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8, ml_dtypes.bfloat16, ">f4"])
def test_real_numbers_of_any_width_are_converted(dtype):
    inputs = LIBERO.parse({**OBSERVATIONS["libero"], "observation/state": np.arange(8).astype(dtype)})
    np.testing.assert_array_equal(inputs.state, np.arange(8))


@pytest.mark.parametrize(
    ("robot", "path", "value", "message"),
    [
        ("aloha", "images/cam_high", None, "required camera is missing; the observation has images/cam_right_wrist"),
        ("aloha", "images/cam_high", HWC, r"shape \(3, height, width\)"),
        ("aloha", "images/cam_low", HWC, r"shape \(3, height, width\)"),
        ("aloha", "images/cam_hihg", CHW, "unknown entry; did you mean `images/cam_high`"),
        ("aloha", "state", None, "required 14 numbers is missing"),
        ("aloha", "state", np.zeros(7), r"expected shape \(14,\), got \(7,\)"),
        ("aloha", "state", np.zeros((1, 14)), r"expected shape \(14,\), got \(1, 14\)"),
        ("aloha", "state", np.zeros(14, complex), "expected real numbers, got dtype complex128"),
        ("aloha", "state", np.zeros(14, bool), "expected real numbers, got dtype bool"),
        ("aloha", "state", np.full(14, "1"), "expected real numbers, got dtype <U1"),
        ("aloha", "state", "home", "expected real numbers"),
        ("aloha", "state", [[1.0], [1.0, 2.0]], "expected an array"),
        ("aloha", "state", np.array([*range(13), np.nan]), "expected finite numbers, element 13 is nan"),
        ("droid", "observation/joint_position", np.full(7, np.inf), "expected finite numbers, element 0 is inf"),
        ("droid", "observation/gripper_position", np.zeros(2), r"expected shape \(1,\), got \(2,\)"),
        ("droid", "observation/wrist_image_left", np.ones((6, 8, 3)) * 9, "floats in"),
        ("droid", "observation/exterior_image_2_left", HWC, "did you mean `observation/exterior_image_1_left`"),
        ("libero", "actions", np.zeros(7), "unknown entry; known: observation/image"),
    ],
)
def test_what_is_wrong_is_named(robot, path, value, message):
    observation = {key: entry for key, entry in OBSERVATIONS[robot].items() if key != path or value is not None}
    if value is not None:
        observation[path] = value
    with pytest.raises(InvalidObservationError, match=message) as caught:
        ROBOTS[robot].parse(observation)
    assert caught.value.field == path


def test_aloha_conversion_leaves_the_observation_alone():
    state = np.linspace(0, 1, 14)
    observation = {**OBSERVATIONS["aloha"], "state": state.copy()}
    inputs = aloha(adapt_to_pi=True).parse(observation)
    np.testing.assert_array_equal(observation["state"], state)
    assert inputs.state[1] == -state[1]
    assert inputs.state[13] == gripper_to_angular(state[13])


def test_raw_robot_takes_entries_in_the_configured_order():
    cameras = (
        CameraEntry("wrist", "right_wrist_0_rgb", ImageLayout.HWC, required=False),
        CameraEntry("front", "base_0_rgb"),
    )
    robot = raw(cameras, (StateEntry("b", 1), StateEntry("a", 2)), 3)
    inputs = robot.parse({"a": np.array([1, 2]), "b": np.array(0), "wrist": HWC, "front": CHW})
    assert [path for path, _ in inputs.images] == ["front", "wrist"]
    assert inputs.state.tolist() == [0, 1, 2]
    assert list(robot.view_counts) == [1, 2]


@pytest.mark.parametrize(
    ("cameras", "message"),
    [
        ([CameraEntry("a", "base_0_rbg")], "no camera 'base_0_rbg' in the model"),
        ([CameraEntry("a", "base_0_rgb"), CameraEntry("b", "base_0_rgb")], "2 pictures"),
        ([CameraEntry("a", "base_0_rgb", required=False)], "at least one camera must be required"),
        ([CameraEntry("s", "base_0_rgb")], "path 's' is named twice"),
    ],
)
def test_raw_robots_that_contradict_themselves_are_refused(cameras, message):
    with pytest.raises(ValueError, match=message):
        raw(tuple(cameras), (StateEntry("s", 2),), 2)


def test_encoding_actions_undoes_decoding_them():
    actions = np.random.default_rng(3).standard_normal((5, 14))
    for robot in (aloha(adapt_to_pi=True), *ROBOTS.values()):
        ours = actions[:, : robot.action_dim]
        np.testing.assert_allclose(robot.encode(robot.decode(ours)), ours, atol=1e-12)
    moved = aloha(adapt_to_pi=True).decode(actions)
    assert np.abs(moved - actions).max() > 0.1
