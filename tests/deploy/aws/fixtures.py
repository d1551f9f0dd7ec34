"""One stand-in account with everything applied, for all of these checks."""

import base64
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.aws.instance import Instance
from tests.deploy.aws.servers import REGION, SERVERS, apply_servers, apply_shared
from tests.deploy.aws.stand_in import MissingToolError, StandIn, Terraform, stand_in


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    with stand_in(tmp_path_factory.mktemp("aws")) as server:
        yield server


@pytest.fixture(scope="session")
def terraform(aws: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Terraform:
    try:
        return Terraform(tmp_path_factory.mktemp("terraform"), aws)
    except MissingToolError as missing:
        Path(os.environ.get("TEST_DEPLOY_REASON", os.devnull)).write_text(str(missing))
        pytest.exit(str(missing), returncode=3)


@pytest.fixture(scope="session")
def shared(terraform: Terraform) -> dict[str, Any]:
    """Outputs of the shared resources, which have been applied."""
    return apply_shared(terraform)


@pytest.fixture(scope="session")
def servers_root(terraform: Terraform, aws: StandIn, shared: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A root with every server, and its outputs."""
    return apply_servers(terraform, aws, shared, SERVERS)


@pytest.fixture(scope="session")
def instances(servers_root: tuple[str, dict[str, Any]], aws: StandIn) -> dict[str, Instance]:
    ec2 = aws.client("ec2", REGION)
    found = {}
    for name, outputs in servers_root[1].items():
        id_ = outputs["instance_id"]
        described = ec2.describe_instances(InstanceIds=[id_])["Reservations"][0]["Instances"][0]
        encoded = ec2.describe_instance_attribute(InstanceId=id_, Attribute="userData")["UserData"]["Value"]
        user_data = base64.b64decode(encoded)
        assert len(user_data) <= 16 * 1024, "EC2 takes no more"
        text = gzip.decompress(user_data).decode()
        files = {file["path"]: file["content"] for file in yaml.safe_load(text)["write_files"]}
        found[name] = Instance(outputs, described, text, files)
    return found
