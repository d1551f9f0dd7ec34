"""QUIC between two network namespaces that reach a relay, and each other only where the relay's machine forwards."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openpi_flash_cli.demo import small_settings

from benchmarks.link.link import Link, Namespace, Network
from tests.support import needs_links

PORT = "3479"

pytestmark = needs_links


def default_route(namespace: Namespace, link: Link) -> None:
    """Sends whatever goes nowhere else to the other end of the link, where the relay is."""
    device = json.loads(namespace.run("ip", "-j", "route", "get", link.server_address))[0]["dev"]
    namespace.run("ip", "route", "add", "default", "dev", device)


@pytest.mark.parametrize(("forwards", "path"), [("0", "relay"), ("1", "direct")])
def test_takes_a_direct_path_where_there_is_one_and_else_the_relay(
    tiny_policies: Any, tmp_path: Path, forwards: str, path: str
):
    config = tmp_path / "settings.json"
    config.write_text(json.dumps(small_settings(tiny_policies["jax"], tmp_path)))
    folder = tmp_path / "store"
    folder.mkdir()
    with Network() as network:
        robot, container, middle = (network.namespace(name) for name in ("robot", "modal", "relay"))
        first = network.link(robot, middle, rtt_ms=20)
        second = network.link(container, middle, rtt_ms=10)
        middle.run("sysctl", "-q", "-w", f"net.ipv4.ip_forward={forwards}")
        default_route(robot, first)
        default_route(container, second)
        environment = {
            **os.environ,
            "INFERENCE_CONFIG_PATH": str(config),
            "OPENPI_FLASH_STATE_DIR": str(tmp_path / "state"),
            "JAX_PLATFORMS": "cpu",
            "QUIC_RELAY_IP": f"{second.server_address}:{PORT}",
            "QUIC_RELAY_KEY": "sesame",
        }
        relay = [sys.executable, "-m", "openpi_flash_client.portal", f"{second.server_address}:{PORT}"]
        middle.start(relay, env=environment)
        end = [sys.executable, "-m", "tests.modal_end"]
        server = container.start([*end, "serve", folder], env=environment, stdout=subprocess.PIPE)
        assert server.stdout is not None
        assert "stored quic\n" in iter(server.stdout.readline, ""), "the server has ended"
        test = robot.start([*end, "test", folder], env=environment, stdout=subprocess.PIPE)
        output, _ = test.communicate(timeout=150)
        server.send_signal(signal.SIGINT)
    assert test.returncode == 0
    assert f"path to the server: {path}\n" in output
    assert "5 calls after 1" in output
    least = next(line for line in output.splitlines() if "round trip - server" in line)
    assert all(float(figure) >= 30 for figure in least.strip("│ ").split("│")[1:]), "both links' round trips are in it"
