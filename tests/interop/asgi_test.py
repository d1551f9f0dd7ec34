"""The engine as an ASGI application under uvicorn, as Modal runs it, with the stock openpi-client."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from openpi_flash_cli.demo import free_ports, small_settings
from openpi_flash_cli.tiny import TinyPolicy
from openpi_flash_models.load import load_policy
from openpi_flash_models.policy_configs import load_policy_config

from tests.interop.robots import robots


@pytest.fixture
def settings(tiny_policies: dict[str, TinyPolicy], tmp_path: Path) -> dict[str, Any]:
    return small_settings(tiny_policies["jax"], tmp_path)


def start(settings: dict[str, Any], tmp_path: Path) -> tuple[subprocess.Popen[bytes], int]:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    (port,) = free_ports(1)
    uvicorn = [sys.executable, "-m", "uvicorn", "--factory", "openpi_flash_cli.asgi:application"]
    process = subprocess.Popen(
        [*uvicorn, "--port", str(port), "--log-level", "warning"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "INFERENCE_CONFIG_PATH": str(path)},
    )
    return process, port


def test_the_stock_client_gets_the_actions_of_a_direct_call(settings, tmp_path, stock_python, observation_with_noise):
    process, port = start(settings, tmp_path)
    try:
        wait_healthy(port)
        with robots(stock_python, ["policy"], port, observation_with_noise[1], 3) as (robot,):
            result = robot.result()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn ends as the signal would
    finally:
        process.kill()
    action, observation = settings["action"], dict(observation_with_noise[0])
    config = load_policy_config(action["model_config_name"])
    policy = load_policy(config, Path(action["checkpoint_dir"]), device="cpu", precision="float32", max_batch_size=1)
    direct = policy.infer(observation, noise=observation.pop("noise"))["actions"]
    assert result["actions"] == [direct.tobytes().hex()] * 3


def test_ends_when_a_service_cannot_run(settings, tmp_path):
    settings["action"]["checkpoint_dir"] = str(tmp_path / "nowhere")
    process, _ = start(settings, tmp_path)
    try:
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()


def wait_healthy(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
                assert answer.read() == b"OK\n"
                return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError("not healthy within 120 s")
