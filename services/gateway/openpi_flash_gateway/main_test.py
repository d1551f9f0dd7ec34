"""The gateway as a process: what it says when its settings cannot be used, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openpi_flash_common.settings import EXIT_CONFIG


def start(tmp_path: Path, **changes: Any) -> "subprocess.Popen[str]":
    settings = {
        "action": {"model_config_name": "fake", "checkpoint_dir": "nowhere"},
        "action_transport": {"websocket_port": 0, "unix_socket_path": str(tmp_path / "s")},
        "gateway": {"host": "127.0.0.1", "grpc_port": 0, "action": {"address": "127.0.0.1:1"}, "admin": {"port": 0}},
    }
    for section, fields in changes.items():
        settings[section] = {**settings[section], **fields} if fields else None
    config = tmp_path / "settings.json"
    config.write_text(json.dumps(settings))
    return subprocess.Popen(
        [sys.executable, "-m", "openpi_flash_gateway", "--config", config],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"gateway": {"action": {"ca_file": "/nowhere/ca.pem"}}}, "/nowhere/ca.pem: No such file"),
        ({"gateway": {"tls": {"cert_file": "/nowhere/c", "key_file": "/nowhere/k"}}}, "tls"),
        ({"gateway": {"auth": {}}}, "no token is configured"),
        ({"gateway": {"grcp_port": 1}}, "did you mean grpc_port"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, changes, problem):
    process = start(tmp_path, **changes)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_CONFIG
    assert problem in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(("section", "field"), [("gateway", "grpc_port"), ("action_transport", "websocket_port")])
def test_a_port_that_is_taken(tmp_path, section, field):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(tmp_path, **{section: {field: port}})
        _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_CONFIG
    assert f"cannot listen on 127.0.0.1:{port}" in errors
    assert "Traceback" not in errors


def test_sigterm_ends_it_with_0_even_before_there_is_an_action_service(tmp_path):
    process = start(tmp_path)
    assert process.stderr is not None
    while "out of reach" not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors
