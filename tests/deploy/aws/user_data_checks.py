"""What an instance runs: its cloud-init, the services' settings, the containers and their units."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

from tests.deploy.aws.instance import Instance, place
from tests.deploy.aws.servers import DIGEST, MODES, PORTS, SERVERS, each_server

CLOUD_INIT = os.environ.get("CLOUD_INIT")


def cannot(reason: str) -> NoReturn:
    """Fails for what this machine lacks, or skips where that is allowed."""
    if os.environ.get("ALLOW_SKIPS"):
        pytest.skip(reason)
    pytest.fail(f"{reason}; ALLOW_SKIPS=1 goes on without")


@each_server
def test_user_data_is_a_valid_cloud_config(instances: dict[str, Instance], tmp_path: Path, server: str) -> None:
    if not CLOUD_INIT:
        cannot("its schema is in Debian's package alone, which apt-get did not bring: see .cache/terraform-env/apt.log")
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


@each_server
def test_units_are_valid(instances: dict[str, Instance], tmp_path: Path, server: str) -> None:
    if shutil.which("systemd-analyze") is None:
        cannot("no systemd-analyze on the path (package systemd)")
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
