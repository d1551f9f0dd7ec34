"""The servers that are made, and what the stand-in keeps of each: its description and the files of its user data."""

import configparser
import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from openpi_flash_common.settings import EngineSettings, load_settings

from tests.deploy.aws.stand_in import StandIn, Terraform

REGION = "us-west-2"
ROBOTS = "203.0.113.0/24"
DIGEST = "sha256:" + "5a" * 32

ACTION = {"model_config_name": "pi05_aloha"}
PLANNER = {"cadence": "background"}
SERVERS: dict[str, dict[str, Any]] = {
    "action": {"action": ACTION, "prepare_checkpoint": True},
    "planner": {"planner": {"checkpoint_dir": "gs://bucket/planner"}},
    "combined": {
        "action": ACTION,
        "action_backend": "jax",
        "prepare_checkpoint": True,
        "prep_required_asset_ids": ["trossen"],
        "planner": PLANNER,
        "prepare_planner_checkpoint": True,
    },
    # Everything that can be set.
    "full": {
        "action": {"model_config_name": "pi05_droid", "checkpoint_dir": "gs://bucket/droid", "num_steps": 5},
        "pytorch_compile_mode": "max-autotune",
        "planner": PLANNER,
        "prepare_planner_checkpoint": True,
        "planner_prep_hf_repo": "lab/private@v2",
        "planner_prep_tar_path_in_repo": "a/b.tar",
        "planner_prep_output_dir": "/cache/checkpoints/ours",
        "extra_config": {
            "action_transport": {"websocket_port": 9000, "quic_port": 9555},
            "gateway": {"grpc_port": 9051, "max_in_flight": 7, "max_message_bytes": 1 << 20, "default_timeout_ms": 500},
            "log": {"format": "json"},
        },
        "environment": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"},
        "auth_tokens_parameter": "/openpi-flash/tokens",
        "hf_token_parameter": "/openpi-flash/hf-token",
        "tls": {
            "certificate_parameter": "/openpi-flash/tls.crt",
            "private_key_parameter": "/openpi-flash/tls.key",
            "client_ca_parameter": "/openpi-flash/clients.crt",
        },
        "client_cidr_blocks": ["0.0.0.0/0"],
        "image_tag": "v0.1.0",
        "image_digests": {"gateway": DIGEST},
        "root_volume": {"size_gib": 300},
    },
}
PORTS = {
    "action": {("tcp", 8000), ("udp", 5555), ("tcp", 50051)},
    "planner": {("tcp", 8002), ("udp", 5556), ("tcp", 50051)},
    "combined": {("tcp", 8000), ("udp", 5555), ("tcp", 8002), ("udp", 5556), ("tcp", 50051)},
    "full": {("tcp", 9000), ("udp", 9555), ("tcp", 8002), ("udp", 5556), ("tcp", 9051)},
}
MODES = {"action": "action_only", "planner": "planner_only", "combined": "combined", "full": "combined"}

IMAGES = ("action-torch", "action-torch-compile", "action-jax", "planner", "gateway", "edge", "tools")

each_server = pytest.mark.parametrize("server", SERVERS)


@dataclasses.dataclass(frozen=True)
class Instance:
    """What was made for one server, and the files that its user data writes, by path."""

    outputs: dict[str, Any]
    described: dict[str, Any]
    user_data: str
    files: dict[str, str]

    def unit(self, name: str) -> configparser.RawConfigParser:
        """A systemd unit; lines that a backslash joins are one."""
        unit = configparser.RawConfigParser(strict=False)
        unit.optionxform = str  # type: ignore[assignment, method-assign]
        unit.read_string(self.files[f"/etc/systemd/system/{name}"].replace("\\\n", ""))
        return unit

    def container(self, service: str) -> "Container":
        return Container.parse(self.unit(f"openpi-flash-{service}.service")["Service"]["ExecStart"])

    def settings(self, directory: Path) -> EngineSettings:
        path = directory / "config.json"
        path.write_text(self.files["/etc/openpi-flash/config.json"])
        return load_settings(path, environ={})


@dataclasses.dataclass(frozen=True)
class Container:
    """A `docker run`, taken apart."""

    options: tuple[tuple[str, str], ...]
    image: str
    command: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> "Container":
        words = shlex.split(line)
        assert words[:2] == ["/usr/bin/docker", "run"]
        options, at = [], 2
        while words[at].startswith("--"):
            value = "" if words[at] in ("--rm", "--read-only") else words[at + 1]
            options.append((words[at], value))
            at += 2 if value else 1
        return cls(tuple(options), words[at], tuple(words[at + 1 :]))

    def all(self, option: str) -> list[str]:
        return [value for name, value in self.options if name == option]

    def one(self, option: str) -> str:
        (value,) = self.all(option)
        return value

    @property
    def environment(self) -> dict[str, str]:
        return dict(text.split("=", 1) for text in self.all("--env"))


def apply_shared(terraform: Terraform) -> dict[str, Any]:
    """Makes the shared resources; gives their outputs."""
    variables = {"region": REGION, "github_repository": "acme/robots"}
    (terraform.directory / "shared/terraform.tfvars.json").write_text(json.dumps(variables))
    terraform.init("shared")
    return terraform.apply("shared")


def module_of(aws: StandIn, shared: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that every server has."""
    return {
        "source": "../modules/regional_inference_instance",
        "subnet_id": aws.subnet(REGION),
        "client_cidr_blocks": [ROBOTS],
        "image_registry": shared["image_registry"],
        "instance_profile": shared["instance_profile"],
    }


def apply_servers(
    terraform: Terraform, aws: StandIn, shared: Mapping[str, Any], servers: Mapping[str, dict[str, Any]]
) -> tuple[str, dict[str, Any]]:
    """Makes servers; gives their root and its outputs."""
    common = module_of(aws, shared)
    main = {
        "provider": {"aws": {"region": REGION}},
        "module": {name: {**common, "name": name, **variables} for name, variables in servers.items()},
        "output": {name: {"value": f"${{module.{name}}}"} for name in servers},
    }
    root = terraform.new_root("servers", {"main.tf.json": main})
    return root, terraform.apply(root)


def place(root: Path, path: str, content: str, mode: int) -> Path:
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content)
    target.chmod(mode)
    return target
