"""`openpi-flash prepare-checkpoint`: weights from the hub and statistics from a bucket, in one folder to serve."""

import argparse
import logging
import sys
from pathlib import Path

from openpi_flash_models.checkpoints.prepare import DEFAULT_ASSETS, DEFAULT_WEIGHTS, Prepared, prepare_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf-repo",
        default=DEFAULT_WEIGHTS,
        metavar="ORG/REPO",
        help="weights: a Hugging Face repository, /FOLDER and @REVISION may follow (%(default)s)",
    )
    parser.add_argument(
        "--assets-uri",
        default=DEFAULT_ASSETS,
        metavar="URI",
        help="normalisation statistics: a gs:// or hf:// folder of <asset id>/norm_stats.json (%(default)s)",
    )
    parser.add_argument(
        "--required-asset-id",
        action="append",
        default=[],
        metavar="ID",
        help="a robot whose statistics must be there; may be repeated (default: by the name of openpi's checkpoint in"
        " the URI: trossen for *_base, droid for *_droid, physical-intelligence/libero for *_libero)",
    )
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    log_progress()
    prepared = prepare_checkpoint(
        arguments.output_dir,
        hf_repo=arguments.hf_repo,
        assets_uri=arguments.assets_uri,
        required_asset_ids=arguments.required_asset_id,
        force_download=arguments.force_download,
    )
    print_result(prepared, "action.checkpoint_dir")
    return 0


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to make; appears only when it is whole, and is left alone when it was made before. What a stopped"
        " run has fetched waits beside it, in .DIR.preparing",
    )
    parser.add_argument(
        "--force-download", action="store_true", help="fetch everything anew, and replace what this command made before"
    )


def log_progress() -> None:
    """Sends the library's log lines, which say how far it is, to stderr; those of other libraries are not wanted."""
    logger = logging.getLogger("openpi_flash_models")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stderr))


def print_result(prepared: Prepared, setting: str) -> None:
    """Says what is there, whether it was there before, and which setting names it."""
    files, root = prepared.manifest["files"], prepared.checkpoint.root
    gigabytes = sum(file["size"] for file in files.values()) / 1e9
    print(f"{root}: {prepared.checkpoint.layout} weights, {len(files)} files, {gigabytes:.2f} GB")
    if prepared.fresh:
        print(f"prepared; serve it with {setting}")
    else:
        print(f"was prepared already, {prepared.manifest['prepared_at']}; --force-download fetches it anew")
