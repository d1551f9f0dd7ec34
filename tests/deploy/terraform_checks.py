"""`deploy/terraform` against a stand-in AWS, and what its instances would run. `make test-terraform` runs this file."""

import base64
import configparser
import dataclasses
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from openpi_flash_common.settings import EngineSettings, load_settings

from tests.deploy.aws import GPU_IMAGE, TERRAFORM, StandIn, Terraform, stand_in

REGION = "us-west-2"
ROBOTS = "203.0.113.0/24"
DIGEST = "sha256:" + "5a" * 32
CLOUD_INIT = os.environ.get("CLOUD_INIT")
PREPARE = TERRAFORM / "modules/regional_inference_instance/files/prepare"

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


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    with stand_in(tmp_path_factory.mktemp("aws")) as server:
        yield server


@pytest.fixture(scope="module")
def terraform(aws: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Terraform:
    return Terraform(tmp_path_factory.mktemp("terraform"), aws)


@pytest.fixture(scope="module")
def shared(terraform: Terraform) -> dict[str, Any]:
    """Outputs of the shared resources, which have been applied."""
    variables = {"region": REGION, "github_repository": "acme/robots"}
    (terraform.directory / "shared/terraform.tfvars.json").write_text(json.dumps(variables))
    terraform.init("shared")
    return terraform.apply("shared")


@pytest.fixture(scope="module")
def servers_root(terraform: Terraform, aws: StandIn, shared: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A root with every server, and its outputs."""
    common = {
        "source": "../modules/regional_inference_instance",
        "subnet_id": aws.subnet(REGION),
        "client_cidr_blocks": [ROBOTS],
        "image_registry": shared["image_registry"],
        "instance_profile": shared["instance_profile"],
    }
    main = {
        "provider": {"aws": {"region": REGION}},
        "module": {name: {**common, "name": name, **variables} for name, variables in SERVERS.items()},
        "output": {name: {"value": f"${{module.{name}}}"} for name in SERVERS},
    }
    root = terraform.new_root("servers", {"main.tf.json": main})
    return root, terraform.apply(root)


@pytest.fixture(scope="module")
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


# The sources


def test_sources_are_formatted(terraform: Terraform) -> None:
    terraform(".", "fmt", "-check", "-diff", "-recursive")


@pytest.mark.parametrize("root", ["shared", "examples/one-region", "examples/two-regions"])
def test_roots_are_valid(terraform: Terraform, root: str) -> None:
    terraform.init(root)
    terraform(root, "validate", "-no-color")


def test_shell_script_is_sound() -> None:
    subprocess.run(["bash", "-n", PREPARE], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, PREPARE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"action": None}, "Nothing to serve"),
    "no_policy": ({"action": {"checkpoint_dir": "gs://a/b"}}, "action.model_config_name: required"),
    "no_checkpoint": ({"action": ACTION}, "action.checkpoint_dir: either name a checkpoint"),
    "two_checkpoints": (
        {"planner": {"checkpoint_dir": "gs://a/b"}, "prepare_planner_checkpoint": True},
        "planner.checkpoint_dir: either name a checkpoint",
    ),
    "no_planner": ({"prepare_planner_checkpoint": True}, "there is no planner to prepare a checkpoint for"),
    "no_action": (
        {"action": None, "prepare_checkpoint": True},
        "there is no action policy to prepare a checkpoint for",
    ),
    "everybody": ({"client_cidr_blocks": ["0.0.0.0/0"]}, "lets the whole internet in; set auth_tokens_parameter"),
    "nobody": ({"client_cidr_blocks": []}, "at least one IPv4 network"),
    "no_network": ({"client_cidr_blocks": ["203.0.113.7"]}, "each such as 203.0.113.0/24"),
    "no_gpu": ({"instance_type": "m7i.large"}, "expected a type with an NVIDIA GPU"),
    "amd_gpu": ({"instance_type": "g4ad.xlarge"}, "expected a type with an NVIDIA GPU"),
    "subnet": ({"subnet_id": "vpc-1"}, "expected a subnet's id"),
    "registry": ({"image_registry": "example.com/flash/"}, "without a slash at the end"),
    "digest": ({"image_digests": {"gateway": "v1"}}, "expected sha256: and 64 hexadecimal digits"),
    "image": ({"image_digests": {"gatway": DIGEST}}, "the images are action-torch"),
    "small": ({"root_volume": {"size_gib": 30}}, "at least 100"),
    "throughput": ({"root_volume": {"type": "io2", "iops": 4000, "throughput": 500}}, "only gp3 has one to set"),
    "iops": ({"root_volume": {"type": "io2"}}, "io1 and io2 need it"),
    "compile_mode": ({"pytorch_compile_mode": "fast"}, "expected default, reduce-overhead"),
    "jax_compile_mode": ({"action_backend": "jax", "pytorch_compile_mode": "default"}, "JAX always compiles"),
    "backend": ({"action_backend": "tf"}, "expected torch or jax"),
    "section": ({"extra_config": {"gatway": {}}}, "the sections are action_transport"),
    "secret": ({"extra_config": {"gateway": {"auth": {"tokens": ["a"]}}}}, "come from Parameter Store"),
    "environment": ({"environment": {"A": "b c"}}, "hold no spaces"),
    "output_dir": ({"planner_prep_output_dir": "/cache/../etc"}, "expected a path below /cache/"),
    "same_dir": ({"planner_prep_output_dir": "/cache/checkpoints/action"}, "other than prep_output_dir"),
    "tar": ({"planner_prep_tar_path_in_repo": "x.tar.gz"}, "expected the path of an uncompressed .tar"),
    "repo": ({"planner_prep_hf_repo": "pi05; reboot"}, "expected org/repo"),
    "spot": ({"spot": {"max_price_usd": 0}}, "expected a price per hour above 0"),
    "parameter": ({"auth_tokens_parameter": "hunter2"}, "expected a parameter's name"),
}


@pytest.fixture(scope="module")
def complaints(terraform: Terraform, aws: StandIn) -> dict[str, str]:
    """What terraform says of each bad set of variables, and of the good ones, by name.

    Rules that look at one variable come before any that looks at several, and keep those from being tried: hence two
    runs, the second with what the first let pass.
    """
    good = {
        "source": "../modules/regional_inference_instance",
        "subnet_id": aws.subnet(REGION),
        "client_cidr_blocks": [ROBOTS],
        "image_registry": "example.com/flash",
        "instance_profile": "robots",
        "action": {**ACTION, "checkpoint_dir": "gs://a/b"},
        "planner": None,
    }
    cases = {name: {**good, **variables} for name, (variables, _) in BAD.items()}
    cases |= {f"good_{name}": {**good, **variables} for name, variables in SERVERS.items() if "action" in variables}
    found: dict[str, str] = {}
    for attempt in ("bad", "bad-again"):
        files: dict[str, Any] = {
            f"{name}.tf.json": {"module": {name: case}} for name, case in cases.items() if name not in found
        }
        files["main.tf.json"] = {"provider": {"aws": {"region": REGION}}}
        report = terraform(terraform.new_root(attempt, files), "plan", "-json", "-input=false", expect=(1,))
        for line in map(json.loads, report.splitlines()):
            diagnostic = line.get("diagnostic", {})
            if "range" in diagnostic:
                name = diagnostic["range"]["filename"].removesuffix(".tf.json")
                found[name] = found.get(name, "") + diagnostic["detail"] + "\n"
    return found


@pytest.mark.parametrize("name", BAD)
def test_bad_variables_are_refused_with_a_reason(complaints: dict[str, str], name: str) -> None:
    assert BAD[name][1] in complaints.get(name, "")


def test_good_variables_are_not_refused(complaints: dict[str, str]) -> None:
    assert not [name for name in complaints if name.startswith("good_")]


# Shared resources


def test_repositories_keep_latest_and_three_more(shared: dict[str, Any], aws: StandIn) -> None:
    ecr = aws.client("ecr", REGION)
    names = {repository["repositoryName"] for repository in ecr.describe_repositories()["repositories"]}
    assert names == {f"openpi-flash/{image}" for image in IMAGES}
    assert shared["image_registry"] == f"123456789012.dkr.ecr.{REGION}.amazonaws.com/openpi-flash"
    for name in names:
        policy = json.loads(ecr.get_lifecycle_policy(repositoryName=name)["lifecyclePolicyText"])
        latest, tagged, untagged = (rule["selection"] for rule in policy["rules"])
        assert [rule["rulePriority"] for rule in policy["rules"]] == [1, 2, 3]
        assert (latest["tagPatternList"], latest["countType"], latest["countNumber"]) == (
            ["latest"],
            "imageCountMoreThan",
            1,
        )
        assert (tagged["tagPatternList"], tagged["countType"], tagged["countNumber"]) == (
            ["*"],
            "imageCountMoreThan",
            4,
        )
        assert untagged["tagStatus"] == "untagged"


def permissions(aws: StandIn, role: str, policy: str) -> dict[str, set[str]]:
    """Actions by resource, of all statements, which must allow."""
    document = aws.client("iam", REGION).get_role_policy(RoleName=role, PolicyName=policy)["PolicyDocument"]
    found: dict[str, set[str]] = {}
    for statement in document["Statement"]:
        assert statement["Effect"] == "Allow"
        for resource in as_list(statement["Resource"]):
            found.setdefault(resource, set()).update(as_list(statement["Action"]))
    return found


def as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def test_workflows_of_the_repository_alone_may_push(shared: dict[str, Any], aws: StandIn) -> None:
    role = aws.client("iam", REGION).get_role(RoleName="openpi-flash-github")["Role"]
    (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert shared["github_role_arn"] == role["Arn"]
    assert statement["Action"] == "sts:AssumeRoleWithWebIdentity"
    host = "token.actions.githubusercontent.com"
    assert statement["Condition"] == {
        "StringEquals": {f"{host}:aud": "sts.amazonaws.com"},
        "StringLike": {f"{host}:sub": ["repo:acme/robots:ref:refs/heads/main", "repo:acme/robots:ref:refs/tags/v*"]},
    }
    allowed = permissions(aws, "openpi-flash-github", "push-images")
    assert allowed.pop("*") == {"ecr:GetAuthorizationToken"}
    assert all(re.fullmatch(rf"arn:aws:ecr:{REGION}:\d+:repository/openpi-flash/[a-z-]+", arn) for arn in allowed)
    assert {action for actions in allowed.values() for action in actions} == {
        "ecr:BatchCheckLayerAvailability",
        "ecr:BatchGetImage",
        "ecr:CompleteLayerUpload",
        "ecr:GetDownloadUrlForLayer",
        "ecr:InitiateLayerUpload",
        "ecr:PutImage",
        "ecr:UploadLayerPart",
    }


def test_instances_may_pull_and_read_their_secrets_alone(shared: dict[str, Any], aws: StandIn) -> None:
    allowed = permissions(aws, "openpi-flash-instance", "serve")
    everywhere = allowed.pop("*")
    assert {action for action in everywhere if not action.startswith("ssmmessages:")} == {
        "ecr:GetAuthorizationToken",
        "ssm:UpdateInstanceInformation",
    }
    assert allowed.pop("arn:aws:ssm:*:123456789012:parameter/openpi-flash/*") == {"ssm:GetParameter"}
    assert len(allowed) == len(IMAGES)
    for actions in allowed.values():
        assert actions == {"ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"}


# An instance


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
        "source": "../modules/regional_inference_instance",
        "subnet_id": aws.subnet(REGION),
        "client_cidr_blocks": [ROBOTS],
        "image_registry": shared["image_registry"],
        "instance_profile": shared["instance_profile"],
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


@pytest.mark.skipif(not CLOUD_INIT, reason="cloud-init could not be fetched with apt-get download")
@each_server
def test_user_data_is_a_valid_cloud_config(instances: dict[str, Instance], tmp_path: Path, server: str) -> None:
    path = tmp_path / "user-data.yaml"
    path.write_text(instances[server].user_data)
    command = [sys.executable, "-m", "cloudinit.cmd.main", "schema", "--config-file", path]
    environment = {**os.environ, "PYTHONPATH": f"{CLOUD_INIT}/usr/lib/python3/dist-packages"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@each_server
def test_config_is_accepted_by_the_services(instances: dict[str, Instance], tmp_path: Path, server: str) -> None:
    settings = instances[server].settings(tmp_path)
    assert settings.mode == MODES[server] == instances[server].outputs["mode"]
    ports = {("tcp", settings.gateway.grpc_port)}
    for slot in settings.slots:
        transport = getattr(settings, f"{slot}_transport")
        ports |= {("tcp", transport.websocket_port), ("udp", transport.quic_port)}
    assert ports == PORTS[server]
    assert settings.gateway.admin is not None
    assert settings.gateway.admin.host == "127.0.0.1"
    for slot in settings.slots:  # on the host's network: what is not for robots stays on loopback
        assert getattr(settings, slot).host == "127.0.0.1"


def test_sections_reach_the_config(instances: dict[str, Instance], tmp_path: Path) -> None:
    settings = instances["full"].settings(tmp_path)
    assert settings.action is not None and settings.planner is not None
    assert (settings.action.checkpoint_dir, settings.action.num_steps) == ("gs://bucket/droid", 5)
    assert (settings.planner.checkpoint_dir, settings.planner.cadence) == ("/cache/checkpoints/ours", "background")
    assert settings.gateway.tls is not None
    assert settings.gateway.tls.client_ca_file == Path("/run/secrets/clients.crt")
    combined = instances["combined"].settings(tmp_path)
    assert combined.action is not None and combined.planner is not None
    assert combined.action.checkpoint_dir == "/cache/checkpoints/action"
    assert combined.planner.checkpoint_dir == "/cache/checkpoints/planner"
    assert combined.gateway.tls is None and combined.gateway.auth is None


@each_server
def test_the_right_containers_run(instances: dict[str, Instance], server: str) -> None:
    instance = instances[server]
    slots = [slot for slot in ("action", "planner") if slot in SERVERS[server]]
    services = [*slots, "gateway", "edge"]
    wanted = instance.unit("openpi-flash.target")["Unit"]["Wants"].split()
    assert sorted(wanted) == sorted(["openpi-flash-prepare.service", *(f"openpi-flash-{s}.service" for s in services)])
    units = {Path(path).name for path in instance.files if path.startswith("/etc/systemd/system/")}
    assert units == {"openpi-flash.target", *wanted}
    registry = instance.files["/etc/openpi-flash/images"].split("/", 1)[0] + "/openpi-flash"
    tag = ":v0.1.0" if server == "full" else ":latest"
    images = {
        "action": f"{registry}/action-{ {'combined': 'jax', 'full': 'torch-compile'}.get(server, 'torch') }{tag}",
        "planner": f"{registry}/planner{tag}",
        "gateway": f"{registry}/gateway" + (f"@{DIGEST}" if server == "full" else tag),
        "edge": f"{registry}/edge{tag}",
    }
    for service in services:
        container = instance.container(service)
        assert container.image == images[service]
        assert container.one("--network") == "host"
        assert container.one("--user") == "10001:10001"
        assert "--read-only" in dict(container.options)
        assert container.all("--gpus") == (["all"] if service in slots else [])
        assert container.command == ()  # as the image says
        assert container.environment["INFERENCE_CONFIG_PATH"] == "/etc/openpi-flash/config.json"
    pulled = instance.files["/etc/openpi-flash/images"].split()
    tools = [f"{registry}/tools{tag}"] if server != "planner" else []  # where a checkpoint is prepared
    assert sorted(pulled) == sorted([*(images[service] for service in services), *tools])
    assert yaml.safe_load(instance.user_data)["runcmd"][-1] == [
        "systemctl",
        "start",
        "--no-block",
        "openpi-flash.target",
    ]


def test_environment_reaches_the_services(instances: dict[str, Instance]) -> None:
    full = instances["full"]
    for service in ("action", "planner"):
        environment = full.container(service).environment
        assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.4"
        assert environment["HF_TOKEN_PATH"] == "/run/secrets/hf-token"
    assert full.container("action").environment["OPENPI_PYTORCH_COMPILE_MODE"] == "max-autotune"
    assert "OPENPI_PYTORCH_COMPILE_MODE" not in instances["action"].container("action").environment
    assert not [name for name in full.container("gateway").environment if name.startswith(("HF_TOKEN", "XLA_"))]


@each_server
def test_edge_meets_the_gateway_and_keeps_its_certificate(
    instances: dict[str, Instance], tmp_path: Path, server: str
) -> None:
    settings, edge = instances[server].settings(tmp_path), instances[server].container("edge")
    mounts = [dict(part.partition("=")[::2] for part in mount.split(",")) for mount in edge.all("--mount")]
    assert instances[server].container("gateway").all("--mount") == edge.all("--mount")
    writable = {mount["dst"] for mount in mounts if "readonly" not in mount}
    for slot in settings.slots:
        socket = getattr(settings, f"{slot}_transport").unix_socket_path
        assert str(socket.parent) in writable
    assert edge.environment["OPENPI_FLASH_STATE_DIR"].startswith("/cache/")
    assert "/cache" in writable
    assert instances[server].outputs["public_ip"] in edge.environment["OPENPI_FLASH_NAMES"].split(",")
    assert {mount["dst"] for mount in mounts} - writable == {"/etc/openpi-flash", "/run/secrets"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on the path (package systemd)")
@each_server
def test_units_are_valid(instances: dict[str, Instance], tmp_path: Path, server: str) -> None:
    for path, content in instances[server].files.items():
        place(tmp_path, path, content, 0o755 if path.startswith("/usr/") else 0o644)
    place(tmp_path, "/usr/bin/docker", "#!/bin/sh\n", 0o755)
    place(tmp_path, "/etc/systemd/system/docker.service", "[Service]\nExecStart=/usr/bin/docker\n", 0o644)
    for unit in ("network-online", "basic", "sysinit", "shutdown", "multi-user"):
        place(tmp_path, f"/etc/systemd/system/{unit}.target", "[Unit]\nDescription=stand-in\n", 0o644)
    units = sorted(path.name for path in (tmp_path / "etc/systemd/system").glob("openpi-flash*"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={tmp_path}", *units],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "openpi-flash" in line]
    assert not complaints, done.stderr
    assert done.returncode == 0, done.stderr


def place(root: Path, path: str, content: str, mode: int) -> Path:
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content)
    target.chmod(mode)
    return target


# Preparing


def run_prepare(
    instance: Instance, directory: Path, **stubs: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs the script of the user data with programs that write down how they were called; gives those lines."""
    calls = directory / "calls"
    calls.touch()
    programs = {
        "aws": 'case "$1 $2" in "ssm get-parameter") echo "value of ${7}";; *) echo password;; esac',
        "docker": "",
        "iptables": "[[ $2 != -C ]]",
        "nvidia-smi": "",
        "sleep": "",
        **stubs,
    }
    for name, body in programs.items():
        place(directory, f"bin/{name}", f'#!/usr/bin/env bash\necho "{name} $*" >>{calls}\n{body}\n', 0o755)
    for path, content in instance.files.items():
        place(directory, path, content, 0o755)
    done = subprocess.run(
        [directory / "usr/local/lib/openpi-flash/prepare"],
        env={
            **os.environ,
            "PATH": f"{directory / 'bin'}:/usr/bin:/bin",
            "OPENPI_FLASH_ETC": str(directory / "etc/openpi-flash"),
            "OPENPI_FLASH_CACHE": str(directory / "cache"),
            "OPENPI_FLASH_RUN": str(directory / "run"),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, calls.read_text().splitlines()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="files are given to another user, which root alone may do")


@needs_root
def test_prepare_fetches_secrets_images_and_checkpoints(instances: dict[str, Instance], tmp_path: Path) -> None:
    done, calls = run_prepare(instances["full"], tmp_path)
    assert done.returncode == 0, done.stderr
    secrets = {path.name: path for path in (tmp_path / "run/secrets").iterdir()}
    assert set(secrets) == {"tokens", "hf-token", "tls.crt", "tls.key", "clients.crt"}
    for name, path in secrets.items():
        assert path.read_text() == f"value of /openpi-flash/{name}\n"
        assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o400, 10001)
    host = f"123456789012.dkr.ecr.{REGION}.amazonaws.com"
    docker = [call for call in calls if call.startswith("docker")]
    assert docker[0] == f"docker login --username AWS --password-stdin {host}"
    images = instances["full"].files["/etc/openpi-flash/images"].split()
    assert docker[1 : 1 + len(images)] == [f"docker pull --quiet {image}" for image in images]
    (run,) = (call for call in docker if call.startswith("docker run"))
    assert run.endswith(
        f" {host}/openpi-flash/tools:v0.1.0 prepare-planner-checkpoint "
        "--output-dir /cache/checkpoints/ours --hf-repo lab/private@v2 --tar-path-in-repo a/b.tar"
    )
    assert "--env HF_TOKEN_PATH=/run/secrets/hf-token" in run
    assert any("--uid-owner 10001 -j REJECT" in call for call in calls if call.startswith("iptables -w -A"))


@needs_root
def test_prepare_makes_both_checkpoints(instances: dict[str, Instance], tmp_path: Path) -> None:
    done, calls = run_prepare(instances["combined"], tmp_path)
    assert done.returncode == 0, done.stderr
    action, planner = (call for call in calls if call.startswith("docker run"))
    assert action.endswith("prepare-checkpoint --output-dir /cache/checkpoints/action --required-asset-id trossen")
    assert " prepare-planner-checkpoint --output-dir /cache/checkpoints/planner " in planner


@needs_root
def test_prepare_tries_until_it_works(instances: dict[str, Instance], tmp_path: Path) -> None:
    failing = f"echo >>{tmp_path}/tries; [[ $(wc -l <{tmp_path}/tries) -gt 3 ]]"
    done, calls = run_prepare(instances["action"], tmp_path, docker=failing)
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if call.startswith("sleep")] == ["sleep 2", "sleep 4", "sleep 8"]


def test_prepare_says_what_the_machine_image_lacks(instances: dict[str, Instance], tmp_path: Path) -> None:
    place(tmp_path, "etc/openpi-flash/stack.env", instances["action"].files["/etc/openpi-flash/stack.env"], 0o644)
    bash = shutil.which("bash")
    environment = {"PATH": str(tmp_path), "OPENPI_FLASH_ETC": str(tmp_path / "etc/openpi-flash")}
    done = subprocess.run([str(bash), PREPARE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no aws: the machine image must have Docker" in done.stderr


@each_server
def test_no_secret_is_in_the_user_data(instances: dict[str, Instance], server: str) -> None:
    secrets = instances[server].files["/etc/openpi-flash/secrets"].splitlines()
    assert len(secrets) == (5 if server == "full" else 0)
    for line in secrets:  # a name and where to read it
        assert re.fullmatch(r"[a-z.-]+ /openpi-flash/[a-z.-]+", line)


# The examples, and the end


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


def test_destroy_leaves_nothing(terraform: Terraform, servers_root: tuple[str, dict[str, Any]], aws: StandIn) -> None:
    for root in (servers_root[0], "shared"):
        terraform(root, "destroy", "-no-color", "-input=false", "-auto-approve")
    ec2 = aws.client("ec2", REGION)
    instances = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    assert {instance["State"]["Name"] for instance in instances} == {"terminated"}
    assert not ec2.describe_addresses()["Addresses"]
    assert {group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]} == {"default"}
    assert not aws.client("ecr", REGION).describe_repositories()["repositories"]
    assert not aws.client("iam", REGION).list_roles()["Roles"]


# By hand

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


@pytest.fixture
def empty_account(tmp_path: Path) -> Iterator[StandIn]:
    with stand_in(tmp_path) as server:
        yield server


def test_walk_by_hand_works(empty_account: StandIn, tmp_path: Path) -> None:
    *steps, clean_up = blocks("bash")
    look = "aws ec2 describe-instances >instances.json; aws ec2 describe-security-group-rules >rules.json"
    script = "\n".join(["set -euo pipefail", *steps, look, clean_up])
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
    rules = json.loads((tmp_path / "rules.json").read_text())["SecurityGroupRules"]
    inward = {
        (rule["IpProtocol"], rule["FromPort"]) for rule in rules if rule["GroupId"] == group and not rule["IsEgress"]
    }
    # Caddy's 443 and 80, QUIC past it, and the two ports that the load balancer alone reaches.
    assert inward == {("tcp", 443), ("tcp", 80), ("udp", 5555), ("tcp", 8000), ("tcp", 50051)}
    assert not empty_account.client("ecr", REGION).describe_repositories()["repositories"]
    assert not empty_account.client("ec2", REGION).describe_addresses()["Addresses"]
    assert not empty_account.client("elbv2", REGION).describe_load_balancers()["LoadBalancers"]
    assert not empty_account.client("ssm", REGION).describe_parameters()["Parameters"]
