"""The edge's command line, and where its program is looked for."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openpi_flash_common.settings import EXIT_CONFIG, EngineSettings, SettingsError

from openpi_flash_cli.edge import BINARY_VARIABLE, edge_program, find_binary
from openpi_flash_cli.serve import programs

PLANNER = {"checkpoint_dir": "nowhere"}
ACTION = {"model_config_name": "pi05_droid", "checkpoint_dir": "nowhere"}


def options(tmp_path: Path, **sections: Any) -> dict[str, str]:
    argv = edge_program(EngineSettings.model_validate(sections), Path("/bin/edge"), tmp_path).argv
    assert argv[0] == "/bin/edge"
    words = argv[argv.index("server") + 1 :]
    return dict(zip(words[::2], words[1::2], strict=True))


def test_each_slot_has_its_port_and_its_socket(tmp_path):
    found = options(tmp_path, action=ACTION, planner=PLANNER, gateway={"host": "::"})
    assert (found["--action-upstream"], found["--action-listen"]) == ("unix:/tmp/openpi-action.sock", "[::]:5555")
    assert (found["--planner-upstream"], found["--planner-listen"]) == ("unix:/tmp/openpi-planner.sock", "[::]:5556")
    assert "--metrics-listen" not in found
    alone = options(tmp_path, planner=PLANNER, telemetry={"metrics": True})
    assert "--action-upstream" not in alone
    assert alone["--planner-listen"] == "0.0.0.0:5556"
    assert alone["--metrics-listen"] == "127.0.0.1:9093"
    ipv6 = options(tmp_path, planner=PLANNER, telemetry={"metrics": True, "metrics_host": "::1"})
    assert ipv6["--metrics-listen"] == "[::1]:9093"


def test_traces_go_where_those_of_the_services_go(tmp_path):
    assert "--otlp-endpoint" not in options(tmp_path, action=ACTION)
    telemetry = {"otlp_endpoint": "http://collector:4317", "trace_sample_ratio": 0.1}
    found = options(tmp_path, action=ACTION, telemetry=telemetry)
    assert (found["--otlp-endpoint"], found["--trace-sample-ratio"]) == ("http://collector:4317", "0.1")


def test_certificates_and_tokens_are_the_gateways(tmp_path):
    tls = {"cert_file": "/c", "key_file": "/k", "client_ca_file": "/ca"}
    found = options(tmp_path, action=ACTION, gateway={"tls": tls, "auth": {"tokens": ["one", "two"]}})
    assert (found["--cert-file"], found["--key-file"], found["--client-ca-file"]) == ("/c", "/k", "/ca")
    tokens = Path(found["--tokens-file"])
    assert found["--upstream-token-file"] == found["--tokens-file"]
    assert tokens.read_text() == "one\ntwo\n"
    assert stat.S_IMODE(tokens.stat().st_mode) == 0o600


def test_where_the_program_is_looked_for(tmp_path, monkeypatch, capsys):
    settings = EngineSettings.model_validate({"action": ACTION})
    monkeypatch.delenv(BINARY_VARIABLE, raising=False)
    environment = tmp_path / "venv/bin"
    environment.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(environment / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [program.name for program in programs(settings, tmp_path)] == ["action", "gateway"]
    assert "QUIC is not served" in capsys.readouterr().err
    for binary in (environment / "openpi-flash-transport", tmp_path / "openpi-flash-transport"):
        binary.touch(mode=0o700)
        assert find_binary() == binary
    assert [program.name for program in programs(settings, tmp_path)] == ["action", "gateway", "edge"]
    monkeypatch.setenv(BINARY_VARIABLE, str(tmp_path / "other"))
    with pytest.raises(SettingsError, match="other: no program that can be run"):
        find_binary()


def test_as_a_process_of_its_own_it_becomes_the_program_with_the_settings_of_the_environment(tmp_path):
    program = tmp_path / "edge"
    program.write_text('#!/bin/sh\necho "$$ $@"\n')
    program.chmod(0o755)
    environment = {"OPENPI_ACTION__MODEL_CONFIG_NAME": "pi05_droid", "OPENPI_ACTION__CHECKPOINT_DIR": "nowhere"}
    process = start_edge(environment | {BINARY_VARIABLE: str(program)})
    output, _ = process.communicate(timeout=30)
    pid, _, arguments = output.partition(" ")
    assert int(pid) == process.pid  # so that signals reach it
    assert "--action-listen 0.0.0.0:5555" in arguments
    process = start_edge({BINARY_VARIABLE: str(program)})
    assert "nothing to serve" in process.communicate(timeout=30)[1]
    assert process.returncode == EXIT_CONFIG


def start_edge(environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "openpi_flash_cli.edge"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={"PATH": os.environ["PATH"]} | environment, **pipes)
