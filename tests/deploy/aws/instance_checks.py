"""An instance as the stand-in has it: what it is, its open ports, and what a plan says that the stand-in drops."""

import json
import re
from typing import Any

from tests.deploy.aws.instance import Instance
from tests.deploy.aws.servers import PORTS, REGION, ROBOTS, SERVERS, each_server, module_of
from tests.deploy.aws.stand_in import GPU_IMAGE, StandIn, Terraform


@each_server
def test_only_the_ports_of_what_is_served_are_open(instances: dict[str, Instance], aws: StandIn, server: str) -> None:
    (group,) = instances[server].described["SecurityGroups"]
    rules = aws.client("ec2", REGION).describe_security_group_rules(
        Filters=[{"Name": "group-id", "Values": [group["GroupId"]]}]
    )["SecurityGroupRules"]
    inward = [rule for rule in rules if not rule["IsEgress"]]
    assert {(rule["IpProtocol"], rule["FromPort"]) for rule in inward} == PORTS[server]
    assert all(rule["FromPort"] == rule["ToPort"] for rule in inward)
    assert {rule["CidrIpv4"] for rule in inward} == {"0.0.0.0/0" if server == "full" else ROBOTS}
    outputs = instances[server].outputs
    assert set(outputs["open_ports"].values()) == {f"{port}/{protocol}" for protocol, port in PORTS[server]}


def test_commands_call_what_is_served(instances: dict[str, Instance]) -> None:
    """Over WebSocket a server does not say what it takes: the robot is in the policy's name."""
    action, full = instances["action"].outputs, instances["full"].outputs
    address = action["public_ip"]
    assert action["commands"]["grpc"] == f"openpi-flash test grpc {address} --port 50051 --insecure-plaintext"
    assert action["commands"]["action_websocket"] == f"openpi-flash test ws {address} --port 8000 --robot aloha"
    assert " --port 9000 --robot droid --ca-file ca.pem --token TOKEN" in full["commands"]["action_websocket"]
    assert "--robot" not in full["commands"]["planner_websocket"]  # it names none


def test_instance_is_made_as_asked(instances: dict[str, Instance], aws: StandIn) -> None:
    ec2, instance = aws.client("ec2", REGION), instances["full"]
    described = instance.described
    assert described["ImageId"] == GPU_IMAGE["ami_id"]
    assert described["InstanceType"] == "g6e.xlarge"
    assert described["IamInstanceProfile"]["Arn"].endswith("/openpi-flash-instance")
    assert described["PublicIpAddress"] == instance.outputs["public_ip"]
    addresses = ec2.describe_addresses(PublicIps=[instance.outputs["public_ip"]])["Addresses"]
    assert addresses[0]["InstanceId"] == described["InstanceId"]
    assert described["MetadataOptions"]["HttpTokens"] == "required"
    assert described["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    (device,) = described["BlockDeviceMappings"]
    (volume,) = ec2.describe_volumes(VolumeIds=[device["Ebs"]["VolumeId"]])["Volumes"]
    assert (volume["Encrypted"], volume["Size"], volume["VolumeType"]) == (True, 300, "gp3")


def test_spot_and_a_fast_volume_are_asked_for(terraform: Terraform, aws: StandIn, shared: dict[str, Any]) -> None:
    """The stand-in keeps neither, so that this looks at the plan."""
    module = {
        **module_of(aws, shared),
        "ami_id": "ami-00000000000000001",
        "spot": {"max_price_usd": 1.25},
        "root_volume": {"iops": 6000, "throughput": 500},
        **SERVERS["action"],
    }
    main = {"provider": {"aws": {"region": REGION}}, "module": {"spot": module}}
    root = terraform.new_root("spot", {"main.tf.json": main})
    terraform(root, "plan", "-input=false", "-out=plan")
    plan = json.loads(terraform(root, "show", "-json", "plan"))
    (instance,) = (c["change"]["after"] for c in plan["resource_changes"] if c["type"] == "aws_instance")
    assert instance["ami"] == "ami-00000000000000001"
    (volume,) = instance["root_block_device"]
    assert (volume["volume_type"], volume["iops"], volume["throughput"]) == ("gp3", 6000, 500)
    (market,) = instance["instance_market_options"]
    assert (market["market_type"], market["spot_options"][0]["max_price"]) == ("spot", "1.25")
    assert market["spot_options"][0]["spot_instance_type"] == "one-time"


def test_second_plan_is_empty(terraform: Terraform, servers_root: tuple[str, dict[str, Any]]) -> None:
    for root in ("shared", servers_root[0]):
        terraform(root, "plan", "-no-color", "-input=false", "-detailed-exitcode")


@each_server
def test_secrets_are_listed_by_where_to_read_them(instances: dict[str, Instance], server: str) -> None:
    secrets = instances[server].files["/etc/openpi-flash/secrets"].splitlines()
    assert len(secrets) == (5 if server == "full" else 0)
    for line in secrets:  # a name and where to read it
        assert re.fullmatch(r"[a-z.-]+ /openpi-flash/[a-z.-]+", line)
