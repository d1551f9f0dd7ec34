"""A stand-in for AWS on loopback, and Terraform that talks to it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3

TERRAFORM = Path(__file__).parents[3] / "deploy/terraform"
PROVIDER = "registry.terraform.io/hashicorp/aws/5.100.0"

GPU_IMAGE = {
    "ami_id": "ami-0123456789abcdef0",
    "name": "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 22.04) 20260403",
    "description": "stand-in",
    "owner_id": "898082745236",
    "public": True,
    "virtualization_type": "hvm",
    "architecture": "x86_64",
    "state": "available",
    "platform": None,
    "image_type": "machine",
    "hypervisor": "xen",
    "root_device_name": "/dev/sda1",
    "root_device_type": "ebs",
    "sriov": "simple",
    "creation_date": "2026-04-03T00:00:00.000Z",
}


class MissingToolError(Exception):
    """What these tests need is not on this machine; says what, and how to bring it."""


class StandIn:
    """moto's server: keeps what it is told, and runs nothing."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self, service: str, region: str) -> Any:
        return boto3.client(
            service,
            region_name=region,
            endpoint_url=self.url,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def subnet(self, region: str) -> str:
        return str(self.client("ec2", region).describe_subnets()["Subnets"][0]["SubnetId"])


@contextlib.contextmanager
def stand_in(directory: Path) -> Iterator[StandIn]:
    """Runs the server. What it says goes to `directory/moto.log`."""
    images = directory / "images.json"
    images.write_text(json.dumps([GPU_IMAGE]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Path(sys.executable).with_name("moto_server")
    with (directory / "moto.log").open("w") as log:
        process = subprocess.Popen(
            [server, "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, "MOTO_AMIS_PATH": str(images)},
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, (directory / "moto.log").read_text()
            assert time.monotonic() < deadline, "moto_server does not listen"
            time.sleep(0.1)
        yield StandIn(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(timeout=20)


class Terraform:
    """A copy of `deploy/terraform`, so that nothing is left in the tree."""

    def __init__(self, directory: Path, aws: StandIn) -> None:
        self.directory = directory / "terraform"
        shutil.copytree(
            TERRAFORM, self.directory, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*", "*.tfvars")
        )
        self._binary = find_terraform()
        self._mirror = find_mirror()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TF_"))},
            **aws.environment,
            "TF_IN_AUTOMATION": "1",
            "CHECKPOINT_DISABLE": "1",
        }

    def __call__(self, root: str, *arguments: str, expect: tuple[int, ...] = (0,)) -> str:
        """Runs terraform in one folder of the copy and gives what it printed."""
        done = subprocess.run(
            [self._binary, *arguments],
            cwd=self.directory / root,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode in expect, f"terraform {' '.join(arguments)}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def init(self, root: str) -> None:
        mirror = [] if self._mirror is None else [f"-plugin-dir={self._mirror}"]
        self(root, "init", "-no-color", "-input=false", *mirror)

    def apply(self, root: str) -> dict[str, Any]:
        """Applies; gives the outputs."""
        self(root, "apply", "-no-color", "-input=false", "-auto-approve")
        return {name: output["value"] for name, output in json.loads(self(root, "output", "-json")).items()}

    def new_root(self, name: str, files: dict[str, Any]) -> str:
        """Makes a root of JSON files beside the others, ready to be applied."""
        (self.directory / name).mkdir()
        for file, content in files.items():
            (self.directory / name / file).write_text(json.dumps(content))
        self.init(name)
        return name


def find_terraform() -> str:
    """The program that TERRAFORM names, or the one on the path."""
    binary = os.environ.get("TERRAFORM") or shutil.which("terraform")
    if not binary:
        raise MissingToolError("no terraform on the path: install version 1.9 or newer, or name it in TERRAFORM")
    return binary


def find_mirror() -> Path | None:
    """The folder of providers that TF_PLUGIN_DIR names, or that lies where such folders lie; None: ask the registry.

    Raises:
        MissingToolError: the folder that is named does not hold the provider, or there is neither one nor a registry.
    """
    named = os.environ.get("TF_PLUGIN_DIR")
    if named:
        if not (Path(named) / PROVIDER).is_dir():
            raise MissingToolError(f"TF_PLUGIN_DIR: {named} does not hold {PROVIDER}")
        return Path(named)
    usual = (
        Path.home() / ".terraform.d/plugins",
        *map(Path, ("/usr/local/share/terraform/plugins", "/usr/share/terraform/plugins")),
    )
    for folder in (*usual, *Path("/opt").glob("*")):
        if (folder / PROVIDER).is_dir():
            return folder
    registry = PROVIDER.partition("/")[0]
    try:
        urllib.request.urlopen(f"https://{registry}/.well-known/terraform.json", timeout=20).close()
    except OSError as error:
        raise MissingToolError(
            f"no provider for terraform: TF_PLUGIN_DIR names no mirror with {PROVIDER}, and {registry} answers: {error}"
        ) from error
    return None
