"""`openpi-flash prepare-planner-checkpoint`: a planner's checkpoint out of a tar on the hub."""

import argparse

from openpi_flash_models.checkpoints.prepare import prepare_planner_checkpoint

from openpi_flash_cli.prepare import add_output_arguments, log_progress, print_result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf-repo",
        required=True,
        metavar="ORG/REPO",
        help="a Hugging Face repository, @REVISION may follow; e.g. Hebbian-Robotics/pi05_subtask",
    )
    parser.add_argument(
        "--tar-path-in-repo",
        required=True,
        metavar="PATH",
        help="an uncompressed tar of params/, alone or in one folder; e.g. jax/pi05_subtask.tar",
    )
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    log_progress()
    prepared = prepare_planner_checkpoint(
        arguments.output_dir,
        hf_repo=arguments.hf_repo,
        tar_path_in_repo=arguments.tar_path_in_repo,
        force_download=arguments.force_download,
    )
    print_result(prepared, "planner.checkpoint_dir")
    return 0
