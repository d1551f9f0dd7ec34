"""The two commands as a person runs them, against a hub and a bucket on loopback that hold tiny checkpoints."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import tarfile
import termios
import threading
import time

import numpy as np
import pytest
from openpi_flash_models.checkpoints.detect import Layout
from openpi_flash_models.load import load_policy
from openpi_flash_models.planner.config import load_planner_config
from openpi_flash_models.planner.load import load_planner
from openpi_flash_models.policy_configs import load_policy_config
from safetensors.numpy import load_file, save

from openpi_flash_cli.tiny import make_tiny_policy
from tests.remotes import BucketHandler, HubHandler, serving

ASSETS = "checkpoints/pi05_base/assets"
TAR = "jax/pi05_subtask.tar"
PLANNER = ("prepare-planner-checkpoint", "--hf-repo", "Hebbian-Robotics/pi05_subtask", "--tar-path-in-repo", TAR)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    return {layout: make_tiny_policy(directory, layout=layout) for layout in ("torch", "jax")}


@pytest.fixture
def hub(tiny):
    """The repository of the weights, under LeRobot's names."""
    weights = load_file(tiny["torch"].checkpoint_dir / "model.safetensors")
    objects = {
        "model.safetensors": save({f"model.{name}": array for name, array in weights.items()}),
        "config.json": b'{"type": "pi05"}',
        "README.md": b"a model card",
    }
    with serving(HubHandler, "lerobot/pi05_base", objects) as server:
        yield server


@pytest.fixture
def planner_hub(tiny):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:") as tar:
        tar.add(tiny["jax"].checkpoint_dir / "params", "pi05_subtask/params")
    with serving(HubHandler, "Hebbian-Robotics/pi05_subtask", {TAR: packed.getvalue()}) as server:
        yield server


@pytest.fixture
def bucket(tiny):
    stats = (tiny["torch"].checkpoint_dir / "assets/droid/norm_stats.json").read_bytes()
    names = ("trossen", "droid", "physical-intelligence/libero")
    with serving(
        BucketHandler, "openpi-assets", {f"{ASSETS}/{name}/norm_stats.json": stats for name in names}
    ) as server:
        yield server


@pytest.fixture
def start(request, tmp_path):
    """Starts the command with `tmp_path/out` for its result."""

    def start_command(*arguments, stderr=subprocess.PIPE):
        servers = {name: request.getfixturevalue(name) for name in ("hub", "planner_hub", "bucket")}
        hub = servers["planner_hub" if arguments[0] == PLANNER[0] else "hub"]
        environment = {"HF_ENDPOINT": hub.url, "STORAGE_EMULATOR_HOST": servers["bucket"].url}
        return subprocess.Popen(
            [sys.executable, "-m", "openpi_flash_cli", *arguments, "--output-dir", tmp_path / "out"],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    return start_command


@pytest.fixture
def run(start):
    """Runs it to its end: exit status, stdout, stderr."""

    def run_command(*arguments):
        process = start(*arguments)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output, errors

    return run_command


def wait_for(condition):
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(FileNotFoundError):  # renamed while we looked
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def part_has(directory, size):
    return any(part.stat().st_size == size for part in directory.rglob("*.part"))


def beside(directory):
    return sorted(entry.name for entry in directory.iterdir())


def droid_observation():
    return {
        "observation/exterior_image_1_left": np.full((224, 224, 3), 90, np.uint8),
        "observation/wrist_image_left": np.full((224, 224, 3), 120, np.uint8),
        "observation/joint_position": np.linspace(-1, 1, 7),
        "observation/gripper_position": np.array([0.5]),
    }


def test_a_prepared_policy_acts_as_the_checkpoint_that_was_published(run, tiny, tmp_path):
    status, output, errors = run("prepare-checkpoint", "--required-asset-id", "droid", "--required-asset-id", "trossen")
    assert status == 0, errors
    assert f"{tmp_path}/out: torch weights, 5 files" in output
    assert "prepared; serve it with action.checkpoint_dir" in output
    assert "downloading hf://lerobot/pi05_base: 0.00 GB" in errors.splitlines()
    config = load_policy_config(tiny["torch"].policy_file)
    answers = [
        load_policy(config, directory, device="cpu", precision="float32").infer(
            droid_observation(), prompt="go", seed=1
        )
        for directory in (tmp_path / "out", tiny["torch"].checkpoint_dir)
    ]
    np.testing.assert_array_equal(answers[0]["actions"], answers[1]["actions"])
    manifest = json.loads((tmp_path / "out/source_manifest.json").read_text())
    assert [source["uri"] for source in manifest["sources"]] == [
        "hf://lerobot/pi05_base",
        f"gs://openpi-assets/{ASSETS}",
    ]


def test_a_prepared_planner_writes(run, tiny, tmp_path):
    status, output, errors = run(*PLANNER)
    assert status == 0, errors
    assert f"{tmp_path}/out: jax weights" in output
    assert "serve it with planner.checkpoint_dir" in output
    assert f"unpacking hf://Hebbian-Robotics/pi05_subtask/{TAR}: 0.00 GB" in errors.splitlines()
    assert beside(tmp_path / "out") == ["params", "source_manifest.json"]
    planner = load_planner(load_planner_config(tiny["jax"].policy_file), tmp_path / "out", device="cpu")
    assert planner.infer({**droid_observation(), "prompt": "fold the towel"}).num_tokens
    with pytest.raises(Exception, match=r"looked for model\.safetensors"):
        load_policy(load_policy_config(tiny["torch"].policy_file), tmp_path / "out", backend=Layout.TORCH.value)


def test_a_second_run_leaves_it_alone_and_a_forced_one_makes_it_anew(run, hub, tmp_path):
    assert run("prepare-checkpoint")[0] == 0
    made = (tmp_path / "out/source_manifest.json").stat().st_ino
    hub.requests.clear()
    status, output, _ = run("prepare-checkpoint")
    assert (status, hub.requests) == (0, [])
    assert "was prepared already, 20" in output
    assert (tmp_path / "out/source_manifest.json").stat().st_ino == made
    status, output, _ = run("prepare-checkpoint", "--force-download")
    assert status == 0
    assert "prepared; serve it" in output
    assert sorted(hub.requests) == [("config.json", None), ("model.safetensors", None)]
    assert beside(tmp_path) == [".out.lock", "out"]


@pytest.mark.parametrize("command", [("prepare-checkpoint",), PLANNER], ids=["policy", "planner"])
def test_a_killed_run_leaves_nothing_at_its_place_and_the_next_one_continues(start, run, request, tmp_path, command):
    fixture, name = ("planner_hub", TAR) if command is PLANNER else ("hub", "model.safetensors")
    server = request.getfixturevalue(fixture)
    server.cut_after[name] = 100_000
    server.hold = threading.Event()
    process = start(*command)
    wait_for(lambda: part_has(tmp_path, 100_000))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.hold.set()
    assert beside(tmp_path) == [".out.lock", ".out.preparing"]
    server.cut_after.clear()
    server.requests.clear()
    status, _, errors = run(*command)
    assert status == 0, errors
    assert (name, "bytes=100000-") in server.requests
    assert (name, None) not in server.requests
    assert beside(tmp_path) == [".out.lock", "out"]


def test_a_second_run_at_the_same_time_waits_for_the_first(start, hub, tmp_path):
    hub.cut_after["model.safetensors"] = 1000
    hub.hold = threading.Event()
    first = start("prepare-checkpoint")
    wait_for(lambda: part_has(tmp_path, 1000))
    second = start("prepare-checkpoint")
    assert f"another process is preparing {tmp_path}/out; waiting for it" in second.stderr.readline()
    hub.cut_after.clear()
    hub.hold.set()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert "prepared; serve it" in outputs[0]
    assert "was prepared already" in outputs[1]
    assert [process.returncode for process in (first, second)] == [0, 0]


def test_errors_are_one_line_and_leave_no_result(run, hub, planner_hub, tmp_path):
    status, _, errors = run("prepare-checkpoint", "--required-asset-id", "ur5e")
    assert status == 1
    assert errors.splitlines() == [
        f"openpi-flash prepare-checkpoint: gs://openpi-assets/{ASSETS}: no ur5e/norm_stats.json; it has statistics of "
        "droid, physical-intelligence/libero, trossen"
    ]
    evil = io.BytesIO()
    with tarfile.open(fileobj=evil, mode="w:") as tar:
        member = tarfile.TarInfo("pi05_subtask/params")
        member.type, member.linkname = tarfile.SYMTYPE, "/"
        tar.addfile(member)
    planner_hub.objects[TAR] = evil.getvalue()
    status, _, errors = run(*PLANNER)
    assert status == 1
    assert errors.splitlines()[-1].endswith(
        "'pi05_subtask/params' is a symbolic link to '/'; expected files and folders only"
    )
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    status, _, errors = run("prepare-checkpoint", "--force-download")
    assert status == 1
    assert "remove this one first" in errors
    assert beside(tmp_path / "out") == ["mine"]


def test_a_terminal_gets_a_bar(start, tmp_path):
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 120))
    process = start("prepare-checkpoint", stderr=stderr)
    os.close(stderr)
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"downloading hf://lerobot/pi05_base: 100%" in shown
    assert b"hashing: 100%" in shown
