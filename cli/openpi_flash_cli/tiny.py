"""A tiny random pi0.5 for DROID, in openpi's layout: real files through the real code, small enough for any machine."""

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


@dataclasses.dataclass(frozen=True)
class TinyPolicy:
    """Where the files are.

    Attributes:
        policy_file: for `action.model_config_name`.
        checkpoint_dir: for `action.checkpoint_dir`.
    """

    policy_file: Path
    checkpoint_dir: Path


def make_tiny_policy(directory: Path, *, layout: str = "jax") -> TinyPolicy:
    """Writes tokenizer, policy file and seeded random checkpoint below `directory`.

    Args:
        layout: `jax` (Orbax, served by JAX) or `torch` (safetensors, served by PyTorch).
    """
    directory.mkdir(parents=True, exist_ok=True)
    synthetic.train_tiny_tokenizer(directory / "tokenizer.model", vocab_size=VOCAB_SIZE)
    policy_file = directory / "pi05_droid_tiny.json"
    fields = {"extends": "pi05_droid", "name": "pi05_droid_tiny", "model": MODEL, "tokenizer": "tokenizer.model"}
    policy_file.write_text(json.dumps(fields, indent=2) + "\n")
    config = load_policy_config(policy_file)
    checkpoint_dir = directory / f"checkpoint_{layout}"
    synthetic.make_checkpoint(checkpoint_dir, config.model, layout=layout, asset_ids={"droid": (8, 8)})
    return TinyPolicy(policy_file, checkpoint_dir)
