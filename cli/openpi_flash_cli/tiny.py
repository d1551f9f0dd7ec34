"""A tiny random pi0.5 in openpi's layout: real files through the real code, small enough for any machine."""

import dataclasses
import json
from pathlib import Path

from openpi_flash_models.checkpoints import synthetic
from openpi_flash_models.policy_configs import load_policy_config

VOCAB_SIZE = 512

MODEL = {
    "vision": {"width": 64, "depth": 2, "mlp_dim": 128, "num_heads": 4},
    "vlm": {"width": 64, "depth": 2, "mlp_dim": 128, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16},
    "expert": {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16},
    "vocab_size": VOCAB_SIZE,
}


ASSETS = {"droid": {"droid": (8, 8)}, "aloha": {"trossen": (14, 14)}}
"""Of each robot: the id of its statistics, and its numbers of state and action dimensions."""


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
        robot: `droid` (two cameras) or `aloha` (three).
        layout: `jax` (Orbax, served by JAX) or `torch` (safetensors, served by PyTorch).
    """
    directory.mkdir(parents=True, exist_ok=True)
    synthetic.train_tiny_tokenizer(directory / "tokenizer.model", vocab_size=VOCAB_SIZE)
    name = f"pi05_{robot}_tiny"
    policy_file = directory / f"{name}.json"
    fields = {"extends": f"pi05_{robot}", "name": name, "model": MODEL, "tokenizer": "tokenizer.model"}
    policy_file.write_text(json.dumps(fields, indent=2) + "\n")
    checkpoint_dir = directory / f"{name}_{layout}"
    config = load_policy_config(policy_file)
    synthetic.make_checkpoint(checkpoint_dir, config.model, layout=layout, asset_ids=ASSETS[robot])
    return TinyPolicy(policy_file, checkpoint_dir)
