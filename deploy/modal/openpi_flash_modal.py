"""What the Modal apps share: image, volume, Dict, settings and secrets.

Read when an app is deployed: `.env` beside this file, whose variables become the containers', and
OPENPI_MODAL_CONFIG (settings file; default config.json), OPENPI_MODAL_GPU (default L40S), OPENPI_MODAL_REGION and
OPENPI_MODAL_DICT.
"""

import os
from pathlib import Path

import modal

ROOT = Path(__file__).parent.parent.parent  # in a container, where this file is /root/openpi_flash_modal.py, of no use
SOURCE = "/opt/openpi-flash"
CONFIG = "/etc/openpi-flash/config.json"
CACHE = "/cache"

GPU = os.environ.get("OPENPI_MODAL_GPU", "L40S")
REGION = os.environ.get("OPENPI_MODAL_REGION")
DICT = os.environ.get("OPENPI_MODAL_DICT", "openpi-flash")
DAY_S = 24 * 60 * 60

volume = modal.Volume.from_name("openpi-flash", create_if_missing=True)
rendezvous = modal.Dict.from_name(DICT, create_if_missing=True)
serving = {"gpu": GPU, "region": REGION, "volumes": {CACHE: volume}, "timeout": DAY_S}
"""What a container that serves has."""

INSTALL = (
    # uv, Rust and the packages of the workspace that need a build, all as the Makefile pins them.
    "make wheels",
    "$(make --no-print-directory uv) pip install --system --compile-bytecode"
    " -r requirements/image-tools.txt -r requirements/image-torch.txt -r requirements/image-jax-cuda.txt",
    "$(make --no-print-directory uv) pip install --system --no-deps --build-constraints requirements/build.txt"
    " dist/*.whl ./models ./services/common ./services/action ./services/planner ./services/gateway ./cli",
)
"""Commands, in the checkout, that put what the container images hold, both frameworks for GPUs, into one Python."""

ENVIRONMENT = {
    "INFERENCE_CONFIG_PATH": CONFIG,
    "OPENPI_DATA_HOME": f"{CACHE}/openpi",
    "OPENPI_FLASH_STATE_DIR": f"{CACHE}/state",  # the edge's certificate, and so its fingerprint, outlives a container
    # As the container images have it: action and planner share the GPU, and what is compiled outlives a container.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_COMPILATION_CACHE_DIR": f"{CACHE}/jax",
    "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/torchinductor",
    "TRITON_CACHE_DIR": f"{CACHE}/triton",
    # Robots come by Modal's proxy, a tunnel or the portal, all of which end on this machine.
    "OPENPI_GATEWAY__HOST": "127.0.0.1",
    "OPENPI_MODAL_DICT": DICT,
}

_config = ROOT / os.environ.get("OPENPI_MODAL_CONFIG", "config.json")
if modal.is_local() and not _config.is_file():
    raise FileNotFoundError(
        f"{_config}: no settings; copy deploy/docker/config.example.json there, or name a file by OPENPI_MODAL_CONFIG"
    )

IGNORED = [
    ".git",
    ".venv",
    ".cache",
    "**/__pycache__",
    "target",
    "dist",
    "build",
    "Cargo.lock",
    "**/.env",
    "config.json",
]

image = (
    modal.Image.debian_slim(python_version="3.11")
    .apt_install("build-essential", "curl", "git")
    .add_local_dir(ROOT, SOURCE, copy=True, ignore=IGNORED)
    .run_commands(*(f"cd {SOURCE} && {command}" for command in INSTALL))
    .env(ENVIRONMENT)
    .add_local_file(_config, CONFIG)
    .add_local_python_source("openpi_flash_modal")
)

_dotenv = Path(__file__).with_name(".env")
secrets = [modal.Secret.from_dotenv(_dotenv.parent)] if modal.is_local() and _dotenv.exists() else []
