"""Fixtures of the tests that span packages: a tiny policy on disk, and the whole engine running on it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from openpi_flash_cli.scene import camera_picture
from openpi_flash_cli.tiny import TinyPolicy, make_tiny_policy

from tests.support import Engine, running_engine


@pytest.fixture(scope="session")
def tiny_policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyPolicy]:
    """A tiny pi0.5 for DROID in both layouts, `jax` and `torch` (not the same weights)."""
    directory = tmp_path_factory.mktemp("tiny")
    return {layout: make_tiny_policy(directory, layout=layout) for layout in ("jax", "torch")}


@pytest.fixture(scope="session", params=["jax", "torch"])
def engine(
    request: pytest.FixtureRequest, tiny_policies: dict[str, TinyPolicy], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """A ready engine, with each backend in turn. Tests that harm it start their own."""
    with running_engine(tiny_policies[request.param], tmp_path_factory.mktemp(f"engine-{request.param}")) as engine:
        yield engine


@pytest.fixture
def observation() -> dict[str, Any]:
    """What a DROID robot sends."""
    return {
        "observation/exterior_image_1_left": camera_picture(0, 0, height=224, width=224),
        "observation/wrist_image_left": camera_picture(1, 0, height=224, width=224),
        "observation/joint_position": np.linspace(-0.5, 0.5, 7),
        "observation/gripper_position": np.array([0.25]),
        "prompt": "put the red block into the bowl",
    }
