"""What files show without an engine: images hold what their packages need; the stack publishes what it should."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from openpi_flash_common.settings import load_settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.dockerfile import images
from tests.deploy.kubernetes.values_table import CHART, readme_with_table, uncommented

ROOT = Path(__file__).parents[2]
CUDA_PLUGIN = re.compile(r"jax-cuda|nvidia-")  # of JAX; PyTorch's CUDA packages are in the environment of the tests


def pins(name: str) -> dict[str, set[str]]:
    """Locked versions by package; more than one where they depend on the version of Python."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==(\S+)", line):
            found.setdefault(canonicalize_name(match[1]), set()).add(match[2])
    return found


def members() -> dict[str, dict[str, Any]]:
    """The `project` tables of the workspace's packages."""
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["workspace"]["members"]
    projects = (tomllib.loads((ROOT / member / "pyproject.toml").read_text())["project"] for member in workspace)
    return {project["name"]: project for project in projects}


def needs(package: str, extras: set[str], projects: dict[str, dict[str, Any]]) -> set[str]:
    """Packages from outside that one of the workspace asks for, through others of the workspace, too."""
    project, found = projects[package], set()
    asked = [*project["dependencies"]]
    for extra in extras:
        asked += project["optional-dependencies"][extra]
    for requirement in map(Requirement, asked):
        if requirement.name in projects:
            found |= needs(requirement.name, requirement.extras, projects)
        else:
            found.add(canonicalize_name(requirement.name))
    return found


@pytest.mark.parametrize(
    ("image", "package", "extras"),
    [
        ("gateway", "openpi-flash-gateway", set()),
        ("jax", "openpi-flash-planner", set()),
        ("jax", "openpi-flash-action", {"jax"}),
        ("jax-cuda", "openpi-flash-planner", {"cuda"}),
        ("jax-cuda", "openpi-flash-action", {"jax-cuda"}),
        ("torch", "openpi-flash-action", {"torch"}),
        ("tools", "openpi-flash", set()),
    ],
)
def test_an_image_holds_what_its_package_needs_in_the_versions_that_are_tested(image, package, extras):
    locked, tested = pins(f"image-{image}"), pins("dev")
    assert needs(package, extras, members()) <= locked.keys()
    differing = {name for name, versions in locked.items() if tested.get(name) != versions}
    assert all(image == "jax-cuda" and CUDA_PLUGIN.match(name) for name in differing), differing
    if image == "jax-cuda":
        assert locked["jax-cuda13-plugin"] == locked["jax"]  # jax refuses a plugin of another version


def test_only_gateway_and_edge_are_published_and_the_admin_port_on_loopback_alone():
    compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    robots = ["8000:8000", "8002:8002", "50051:50051"]
    admin, quic = "127.0.0.1:8001:8001", ["5555:5555/udp", "5556:5556/udp"]
    assert published == {
        "gateway": [*robots, admin],
        "openpi-gateway": [*robots, admin],
        "edge": quic,
        "openpi-edge": quic,
    }
    assert compose["networks"]["backend"] == {"internal": True}
    for name in ("action", "planner", "openpi-action", "openpi-planner"):
        assert "robots" not in compose["services"][name]["networks"]


def test_what_fetches_has_a_way_out_and_the_hubs_token():
    """Preparation fetches a checkpoint; the models of the GPU form a tokenizer, and what config.json names."""
    compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    for name in ("prepare-checkpoint", "prepare-planner-checkpoint", "openpi-action", "openpi-planner"):
        service = compose["services"][name]
        networks = [compose["networks"][network] or {} for network in service["networks"]]
        assert any(not network.get("internal") for network in networks), name
        assert "HF_TOKEN" in service["environment"], name


def test_images_are_called_the_same_everywhere():
    """In a registry by their targets, for GPUs; what is built for a laptop's CPU may not take such a name."""
    compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())["services"]
    for name, service in compose.items():
        build = service.get("build", {"target": "tools"})
        is_for_a_cpu = build["target"] in ("action-jax", "planner") and build.get("args") != {"ACCELERATOR": "cuda"}
        called = build["target"] + ("-cpu" if is_for_a_cpu else "")
        registry, tag = "${OPENPI_REGISTRY:+${OPENPI_REGISTRY:-}/}", "${OPENPI_TAG:-latest}"
        assert service["image"] == f"{registry}openpi-flash/{called}:{tag}", name
        assert build["target"].removeprefix("${OPENPI_ACTION_TARGET:-").removesuffix("}") in images(), name
    makefile, terraform = (ROOT / "Makefile").read_text(), ROOT / "deploy/terraform"
    module = (terraform / "modules/regional_inference_instance/variables.tf").read_text()
    lists = {
        "Makefile": re.search(r"^IMAGES := (.*)$", makefile, re.MULTILINE),
        "ecr.tf": re.search(r"images = toset\(\[(.*)\]\)", (terraform / "shared/ecr.tf").read_text()),
        "variables.tf": re.search(r"keys\(var\.image_digests\) : contains\(\[(.*)\], image\)", module),
        "its message": re.search(r"image_digests: the images are (.*)\.\"", module),
    }
    for place, match in lists.items():
        assert match, place
        assert set(re.findall(r"[a-z-]+", match[1])) - {"and"} == images(), place
    repositories = re.findall(r"repository: openpi-flash/([\w-]+)", (CHART / "values.yaml").read_text())
    assert sorted(repositories) == sorted(images())


def test_every_value_of_the_chart_is_explained_and_its_readme_lists_them():
    assert uncommented(CHART / "values.yaml") == []
    readme = (CHART / "README.md").read_text()
    assert readme == readme_with_table(readme, CHART / "values.yaml"), "`make docs` writes the table"


def test_the_charts_own_checkpoint_is_of_its_own_framework():
    """openpi's released checkpoints are Orbax, which JAX serves."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["config"]["action"]["checkpoint_dir"].startswith("gs://openpi-assets/checkpoints/")
    assert values["action"]["framework"] == "jax"


def test_the_example_for_a_gpu_server_names_the_checkpoint_that_is_prepared():
    settings = load_settings(ROOT / "deploy/docker/config.example.json", {})
    assert settings.action is not None
    compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    words = compose["services"]["prepare-checkpoint"]["command"].split()
    (output,) = (word for word in words if "output-dir" in word)
    assert f":-{settings.action.checkpoint_dir}}}" in output
    assert load_settings(ROOT / "deploy/docker/laptop.json", {}).mode == "combined"


def test_every_service_is_confined():
    compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_a_plain_up_is_the_laptops():
    tracked = subprocess.run(["git", "ls-files", ".env"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert tracked.strip() == ".env", "without it `docker compose up` starts nothing"
    assert "COMPOSE_PROFILES=laptop" in (ROOT / ".env").read_text()
