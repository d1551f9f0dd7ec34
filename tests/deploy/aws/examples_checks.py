"""The examples apply and go away, and so does everything."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.aws.servers import REGION, ROBOTS, SERVERS, apply_servers, apply_shared
from tests.deploy.aws.stand_in import StandIn, Terraform, stand_in


@pytest.mark.parametrize("example", ["one-region", "two-regions"])
def test_examples_apply_and_go_away(terraform: Terraform, aws: StandIn, shared: dict[str, Any], example: str) -> None:
    root = f"examples/{example}"
    variables: dict[str, Any] = {name: shared[name] for name in ("image_registry", "instance_profile")}
    if example == "one-region":
        variables |= {"region": REGION, "subnet_id": aws.subnet(REGION), "client_cidr_blocks": [ROBOTS]}
    else:
        regions = {"oregon": "us-west-2", "frankfurt": "eu-central-1"}
        variables["sites"] = {
            site: {"subnet_id": aws.subnet(region), "client_cidr_blocks": [ROBOTS]} for site, region in regions.items()
        }
    (terraform.directory / root / "terraform.tfvars.json").write_text(json.dumps(variables))
    terraform.init(root)
    outputs = terraform.apply(root)
    modes = [server["mode"] for _, server in sorted(outputs.items(), reverse=True)]
    assert modes == (["action_only"] if example == "one-region" else ["combined", "action_only"])
    terraform(root, "plan", "-no-color", "-input=false", "-detailed-exitcode")
    terraform(root, "destroy", "-no-color", "-input=false", "-auto-approve")
    assert terraform(root, "state", "list") == ""


def test_destroy_leaves_nothing(tmp_path: Path) -> None:
    with stand_in(tmp_path) as aws:
        terraform = Terraform(tmp_path, aws)
        root, _ = apply_servers(terraform, aws, apply_shared(terraform), {"action": SERVERS["action"]})
        for applied in (root, "shared"):
            terraform(applied, "destroy", "-no-color", "-input=false", "-auto-approve")
        ec2 = aws.client("ec2", REGION)
        instances = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        assert [instance["State"]["Name"] for instance in instances] == ["terminated"]
        assert not ec2.describe_addresses()["Addresses"]
        assert {group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]} == {"default"}
        assert not aws.client("ecr", REGION).describe_repositories()["repositories"]
        assert not aws.client("iam", REGION).list_roles()["Roles"]
