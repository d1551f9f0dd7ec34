"""docs/aws-manual-setup.md: its commands, run in an empty stand-in account."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.aws.instance import place
from tests.deploy.aws.prepare_checks import PREPARE
from tests.deploy.aws.servers import REGION
from tests.deploy.aws.stand_in import GPU_IMAGE, TERRAFORM, StandIn, stand_in

BY_HAND = TERRAFORM.parents[1] / "docs/aws-manual-setup.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", BY_HAND.read_text(), re.MULTILINE | re.DOTALL)


def test_shell_of_the_walk_by_hand_is_sound(tmp_path: Path) -> None:
    for shell in ("bash", "sh"):  # what is run on the operator's machine; what needs Docker or the instance
        script = place(tmp_path, f"{shell}-blocks", "#!/usr/bin/env bash\n" + "\n".join(blocks(shell)), 0o755)
        exclude = "SC2154" if shell == "sh" else "SC2034"  # variables come from the other blocks
        check = Path(sys.executable).with_name("shellcheck")
        done = subprocess.run([check, f"--exclude={exclude}", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_containers_may_not_have_the_instances_credentials() -> None:
    """As on an instance that Terraform made."""
    (rule,) = re.findall(r"iptables -w -A (OUTPUT .* REJECT)$", PREPARE.read_text(), re.MULTILINE)
    _, on_the_instance, *_ = blocks("sh")
    expected = f'rule="{rule}"'.replace('"$USER_ID"', "10001")
    assert on_the_instance.index(expected) < on_the_instance.index("prepare-checkpoint")


@pytest.fixture
def empty_account(tmp_path: Path) -> Iterator[StandIn]:
    with stand_in(tmp_path) as server:
        yield server


def test_walk_by_hand_works(empty_account: StandIn, tmp_path: Path) -> None:
    *steps, clean_up = blocks("bash")
    closing = next(at for at, step in enumerate(steps) if "revoke-security-group-ingress" in step) + 1
    rules = "aws ec2 describe-security-group-rules"
    looks = f"aws ec2 describe-instances >instances.json; {rules} >rules.json"
    walk = [*steps[:closing], f"{rules} >closed.json", *steps[closing:], looks, clean_up]
    script = "\n".join(["set -euo pipefail", *walk])
    environment = {
        **os.environ,
        **empty_account.environment,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    (instance,) = json.loads((tmp_path / "instances.json").read_text())["Reservations"][0]["Instances"]
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert instance["ImageId"] == GPU_IMAGE["ami_id"]
    (group,) = {group["GroupId"] for group in instance["SecurityGroups"]}

    def inward(file: str) -> set[tuple[str, int]]:
        rules = json.loads((tmp_path / file).read_text())["SecurityGroupRules"]
        own = [rule for rule in rules if rule["GroupId"] == group and not rule["IsEgress"]]
        return {(rule["IpProtocol"], rule["FromPort"]) for rule in own}

    # Before either alternative for TLS, plain text is closed, and QUIC alone is left.
    assert inward("closed.json") == {("udp", 5555)}
    # With both: Caddy's 443 and 80, and the two ports that the load balancer alone reaches.
    assert inward("rules.json") == {("tcp", 443), ("tcp", 80), ("udp", 5555), ("tcp", 8000), ("tcp", 50051)}
    assert not empty_account.client("ecr", REGION).describe_repositories()["repositories"]
    assert not empty_account.client("ec2", REGION).describe_addresses()["Addresses"]
    assert not empty_account.client("elbv2", REGION).describe_load_balancers()["LoadBalancers"]
    assert not empty_account.client("ssm", REGION).describe_parameters()["Parameters"]
