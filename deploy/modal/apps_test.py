"""The apps' definitions, imported by Modal's own package without an account."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import dockerfile

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = ROOT / ".cache/modal-env/bin/python"

DESCRIBE = """
import importlib, json, sys, modal
sys.path.insert(0, sys.argv[1])
import openpi_flash_modal as shared
module = importlib.import_module(sys.argv[2])
print(json.dumps({
    "app": module.app.name,
    "functions": sorted(module.app.registered_functions),
    "entrypoints": sorted(module.app.registered_entrypoints),
    "web": sorted(module.app.registered_web_endpoints),
    "install": shared.INSTALL, "environment": shared.ENVIRONMENT, "secrets": len(shared.secrets),
}))
"""


def describe(module: str, **environment: str) -> dict[str, Any]:
    assert PYTHON.exists(), "make .cache/modal-env/.done, which `make test` does, too"
    environment = {"PATH": os.environ["PATH"], "OPENPI_MODAL_CONFIG": "config.example.json", **environment}
    run = subprocess.run(
        [PYTHON, "-c", DESCRIBE, str(HERE), module], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("module", "functions", "entrypoints", "web"),
    [
        ("websocket_app", ["serve"], [], ["serve"]),
        ("tunnel_app", ["serve"], ["main"], []),
        ("quic_app", ["serve"], ["main"], []),
        ("checkpoints_app", ["convert", "prepare", "prepare_planner"], [], []),
    ],
)
def test_definitions_import(module, functions, entrypoints, web):
    found = describe(module)
    assert found["app"].startswith("openpi-flash-")
    assert found["functions"] == functions
    assert found["entrypoints"] == entrypoints
    assert found["web"] == web


def test_what_the_image_installs_is_in_the_checkout():
    install = "\n".join(describe("tunnel_app")["install"])
    targets = re.findall(r"make (?:--no-print-directory )?(\w+)", install)
    assert set(targets) == {"wheels", "uv"}
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for path in re.findall(r"requirements/[\w-]+\.txt|(?<= )\./[\w/]+", install):
        assert (ROOT / path).exists(), path


def test_the_image_holds_both_frameworks_for_gpus_in_versions_that_agree():
    install = "\n".join(describe("tunnel_app")["install"])
    locks = set(re.findall(r"-r requirements/([\w-]+)\.txt", install))
    assert locks == {"image-tools", "image-torch", "image-jax-cuda"}
    pinned: dict[str, set[tuple[str, ...]]] = {}
    for lock in locks:
        text = (ROOT / f"requirements/{lock}.txt").read_text()
        packages = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
        for name in {name for name, _ in packages}:  # more than one version, where Python's decides
            versions = tuple(sorted(version for other, version in packages if other == name))
            pinned.setdefault(name, set()).add(versions)
    assert {"torch", "jax-cuda13-plugin"} <= pinned.keys()
    assert not {name: versions for name, versions in pinned.items() if len(versions) > 1}


def test_a_container_is_told_what_the_images_are_told_of_frameworks():
    environment = describe("tunnel_app")["environment"]
    jax, torch = dockerfile.environment("action-jax"), dockerfile.environment("action-torch-compile")
    frameworks = {name: value for name, value in {**jax, **torch}.items() if re.match("JAX|XLA|TORCH|TRITON", name)}
    assert len(frameworks) == 4
    assert frameworks.items() <= environment.items()


def test_the_containers_settings_are_ones_that_are_read():
    environment = describe("tunnel_app")["environment"]
    page = (ROOT / "docs/configuration.md").read_text()
    for name in ("OPENPI_DATA_HOME", "OPENPI_FLASH_STATE_DIR", "OPENPI_GATEWAY__HOST", "INFERENCE_CONFIG_PATH"):
        assert name in environment
        assert f"`{name}`" in page


def test_without_settings_it_says_what_to_do():
    run = subprocess.run(
        [PYTHON, "-c", DESCRIBE, str(HERE), "tunnel_app"],
        env={"PATH": os.environ["PATH"], "OPENPI_MODAL_CONFIG": "nowhere.json"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "copy deploy/docker/config.example.json there" in run.stderr


def test_names_of_checkpoints_stay_in_their_folder():
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import checkpoints_app as c; print(c.directory(sys.argv[1]))"
    )
    environment = {"PATH": os.environ["PATH"], "OPENPI_MODAL_CONFIG": "config.example.json"}
    for name, good in (("pi05_base", True), ("../x", False), ("", False), (".x", False)):
        run = subprocess.run([PYTHON, "-c", code, name], env=environment, capture_output=True, text=True, check=False)
        assert (run.returncode == 0) == good
        if good:
            assert run.stdout == "/cache/checkpoints/pi05_base\n"
