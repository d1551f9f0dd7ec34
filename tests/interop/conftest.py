"""The environment of the stock openpi-client, and what its robots send."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def stock_python() -> Path:
    """The interpreter of an environment with openpi-client and nothing of openpi-flash."""
    python = Path(__file__).parents[2] / ".cache/openpi-client-env/bin/python"
    assert python.exists(), "make .cache/openpi-client-env/.done, which `make test` does, too"
    return python


@pytest.fixture
def observation_with_noise(observation: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """An observation whose actions are one and the same each time, and a file of it."""
    noise = np.random.default_rng(7).standard_normal((15, 32), dtype=np.float32)
    path = tmp_path / "observation.npz"
    np.savez(path, **observation, noise=noise)
    return {**observation, "noise": noise}, path
