"""The servers that the checks make, what each is to be, and how they are applied."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

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
        "prep_hf_repo": "lab/jax",
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

each_server = pytest.mark.parametrize("server", SERVERS)


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
