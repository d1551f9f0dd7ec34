"""Checkpoints on the Modal volume, which the serving apps see below /cache.

    modal run deploy/modal/checkpoints_app.py::prepare --name pi05_base
    modal run deploy/modal/checkpoints_app.py::prepare_planner --name pi05_subtask --hf-repo ORG/REPO --tar-path x.tar
    modal run deploy/modal/checkpoints_app.py::convert --config pi05_droid --source gs://… --name pi05_droid_torch

The result is served with `"checkpoint_dir": "/cache/checkpoints/NAME"`.
"""

import subprocess
import sys

import modal
import openpi_flash_modal as resources

app = modal.App("openpi-flash-checkpoints", image=resources.image, secrets=resources.secrets)

_WORK = {"volumes": {resources.CACHE: resources.volume}, "timeout": 6 * 60 * 60, "memory": 32 * 1024, "cpu": 4.0}


@app.function(**_WORK)
def prepare(name: str, hf_repo: str = "", assets_uri: str = "", required_asset_id: str = "") -> None:
    """Weights from the hub and statistics from a bucket, as `openpi-flash prepare-checkpoint`."""
    options = {"--hf-repo": hf_repo, "--assets-uri": assets_uri, "--required-asset-id": required_asset_id}
    _run("prepare-checkpoint", "--output-dir", directory(name), *given(options))


@app.function(**_WORK)
def prepare_planner(name: str, hf_repo: str, tar_path: str) -> None:
    """A planner's checkpoint, as `openpi-flash prepare-planner-checkpoint`."""
    options = {"--hf-repo": hf_repo, "--tar-path-in-repo": tar_path}
    _run("prepare-planner-checkpoint", "--output-dir", directory(name), *given(options))


@app.function(**_WORK)
def convert(config: str, source: str, name: str, precision: str = "bfloat16", check: bool = True) -> None:
    """Orbax to safetensors, as `openpi-flash convert-checkpoint`."""
    options = [] if check else ["--no-check"]
    _run("convert-checkpoint", config, source, directory(name), "--precision", precision, *options)


def directory(name: str) -> str:
    """Where the checkpoint of a name is kept."""
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"name: {name!r}; a folder's plain name is expected")
    return f"{resources.CACHE}/checkpoints/{name}"


def given(options: dict[str, str]) -> list[str]:
    """Those that have a value, as a command line."""
    return [word for option, value in options.items() if value for word in (option, value)]


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "openpi_flash_cli", *arguments], check=True)  # noqa: S603 - our own program
    resources.volume.commit()
