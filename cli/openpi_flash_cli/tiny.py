"""A tiny random pi0.5 in openpi's layout: real files through the real code, small enough for any machine.

`python -m openpi_flash_cli.tiny DIR` makes one for DROID, served by JAX, below DIR, unless it is there.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from openpi_flash_models.checkpoints import synthetic
from openpi_flash_models.policy_configs import load_policy_config

VOCAB_SIZE = 512
SEED = 1  # the first whose model, as a planner, writes letters

MODEL = {
    "vision": {"width": 64, "depth": 2, "mlp_dim": 128, "num_heads": 4},
    "vlm": {"width": 64, "depth": 2, "mlp_dim": 128, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16},
    "expert": {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16},
    "vocab_size": VOCAB_SIZE,
}


ROBOTS: dict[str, dict[str, Any]] = {
    "droid": {"extends": "pi05_droid"},
    "three_cameras": {
        "extends": "pi05_droid",
        "robot": "raw",
        "camera_map": {"base_0_rgb": "top", "left_wrist_0_rgb": "left", "right_wrist_0_rgb": "right"},
        "state": [{"path": "state", "dim": 8}],
        "robot_action_dim": 8,
        "delta_action_mask": None,
        "asset_id": "droid",
    },
}
"""What the policy file of each robot says beside the model's sizes."""

ASSETS = {"droid": (8, 8)}
"""The statistics of both: numbers of state and action dimensions."""


@dataclasses.dataclass(frozen=True)
class TinyPolicy:
    """Where the files are.

    Attributes:
        policy_file: for `action.model_config_name`.
        checkpoint_dir: for `action.checkpoint_dir`.
    """

    policy_file: Path
    checkpoint_dir: Path


def make_tiny_policy(directory: Path, *, robot: str = "droid", layout: str = "jax") -> TinyPolicy:
    """Writes tokenizer, policy file and seeded random checkpoint below `directory`.

    Args:
        robot: one of ROBOTS.
        layout: `jax` (Orbax, served by JAX) or `torch` (safetensors, served by PyTorch).
    """
    directory.mkdir(parents=True, exist_ok=True)
    synthetic.train_tiny_tokenizer(directory / "tokenizer.model", vocab_size=VOCAB_SIZE)
    name = f"pi05_{robot}_tiny"
    policy_file = directory / f"{name}.json"
    fields = {**ROBOTS[robot], "name": name, "model": MODEL, "tokenizer": "tokenizer.model"}
    policy_file.write_text(json.dumps(fields, indent=2) + "\n")
    checkpoint_dir = directory / f"{name}_{layout}"
    config = load_policy_config(policy_file)
    synthetic.make_checkpoint(checkpoint_dir, config.model, layout=layout, seed=SEED, asset_ids=ASSETS)
    return TinyPolicy(policy_file, checkpoint_dir)


def main() -> None:
    """What is made appears when it is whole, so that a stopped run is made up for by the next."""
    directory = Path(sys.argv[1])
    if not directory.exists():
        with tempfile.TemporaryDirectory(prefix=".tiny-", dir=directory.parent) as temporary:
            made = Path(temporary) / directory.name
            make_tiny_policy(made)
            made.rename(directory)
    print(directory)


if __name__ == "__main__":
    main()
