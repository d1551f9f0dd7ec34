"""A picture prepared at the robot is to every kind of robot what the array would have been, bit for bit."""

from typing import Any

import numpy as np
import pytest
from openpi_flash.v1 import inference_pb2
from openpi_flash_cli.scene import camera_picture
from openpi_flash_client.codec import write_request
from openpi_flash_client.pictures import prepare, read_cameras
from openpi_flash_common.codec import image_specs_to_proto, observation_from_proto
from openpi_flash_models.images import ImageLayout, resize_with_pad
from openpi_flash_models.observation import image_specs
from openpi_flash_models.robots.aloha import aloha
from openpi_flash_models.robots.base import CameraEntry, Robot, StateEntry
from openpi_flash_models.robots.droid import DROID
from openpi_flash_models.robots.libero import LIBERO
from openpi_flash_models.robots.raw import raw

SIZE = 224
HWC_ONLY = raw((CameraEntry("top", "base_0_rgb", ImageLayout.HWC),), (StateEntry("state", 2),), 2)
ROBOTS = {"aloha": aloha(adapt_to_pi=True), "droid": DROID, "libero": LIBERO, "hwc only": HWC_ONLY}


def channels_first(view: np.ndarray) -> np.ndarray:
    return view.transpose(2, 0, 1)


ARRANGED = {
    "as a camera gives it": np.asarray,
    "mirrored": lambda view: view[:, ::-1],
    "float32": lambda view: (view / 255).astype(np.float32),
    "float64": lambda view: view / 255,
    "float16": lambda view: (view / 255).astype(np.float16),
}


@pytest.mark.parametrize("size", [(224, 224), (480, 640), (97, 101)], ids=str)
@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED)
@pytest.mark.parametrize("robot", ROBOTS.values(), ids=ROBOTS)
def test_what_the_model_sees(robot: Robot, arrange: Any, size: tuple[int, int]):
    specs = image_specs_to_proto(image_specs(robot, SIZE))
    for turned in (np.asarray, np.ascontiguousarray):
        observation = {}
        for view, entry in enumerate(robot.cameras):
            picture = arrange(camera_picture(view, 0, height=size[0], width=size[1]))
            is_chw = entry.layout is ImageLayout.CHW or (entry.layout is ImageLayout.EITHER and view == 1)
            observation[entry.path] = turned(channels_first(picture) if is_chw else picture)
        as_arrays, prepared = seen(robot, specs, observation, {}), seen(robot, specs, observation, read_cameras(specs))
        assert [name for name, _ in prepared] == [name for name, _ in as_arrays]
        for (_, array), (_, picture) in zip(as_arrays, prepared, strict=True):
            np.testing.assert_array_equal(resize_with_pad(picture, SIZE, SIZE), resize_with_pad(array, SIZE, SIZE))


def seen(robot: Robot, specs: Any, observation: dict[str, Any], cameras: Any) -> list[tuple[str, np.ndarray]]:
    """The pictures as the action service hands them to the model."""
    request = inference_pb2.InferRequest()
    pictures = write_request(request, observation, cameras)
    request.MergeFromString(prepare(pictures))
    first = {spec.path for spec in image_specs(robot, SIZE) if spec.layout is ImageLayout.CHW}
    return robot.parse_images(observation_from_proto(request.observation, first)[0])
