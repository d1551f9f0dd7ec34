"""`openpi-flash convert-checkpoint`: Orbax parameters to model.safetensors, checked by running both."""

import argparse
import sys
from pathlib import Path

from openpi_flash_models.checkpoints.check import MAX_DIFFERENCE, MIN_COSINE, check_same_actions
from openpi_flash_models.checkpoints.convert import Precision, convert
from openpi_flash_models.checkpoints.download import resolve
from openpi_flash_models.policy_configs import load_policy_config
from tqdm import tqdm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="name of an openpi configuration, or path of a policy file")
    parser.add_argument("checkpoint", help="directory that holds params/: a local path, gs:// or hf://")
    parser.add_argument("output", type=Path, help="directory to make; must not exist, or be empty")
    parser.add_argument(
        "--precision",
        type=Precision,
        choices=tuple(Precision),
        default=Precision.BFLOAT16,
        help="element type of the result; mixed keeps norms, patch embedding and the small projections in float32"
        " (default: bfloat16)",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="skip the comparison of actions, which runs PyTorch and JAX on the CPU"
    )


def run(arguments: argparse.Namespace) -> int:
    config = load_policy_config(arguments.config).model
    source = resolve(arguments.checkpoint)
    with tqdm(unit="B", unit_scale=True, desc="convert", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        convert(source, arguments.output, config, arguments.precision, progress)
    print(f"wrote {arguments.output}")
    if arguments.no_check:
        return 0
    check = check_same_actions(source, arguments.output, config)
    print(f"actions, float32 on the CPU: largest difference {check.max_difference:.1e}, cosine {check.cosine:.6f}")
    if check.passed:
        return 0
    expected = f"a difference of at most {MAX_DIFFERENCE:.0e}" if check.exact else f"a cosine of at least {MIN_COSINE}"
    print(f"openpi-flash convert-checkpoint: the actions differ; expected {expected}", file=sys.stderr)
    return 1
