"""The script that fetches secrets, images and checkpoints before an instance's services start."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.deploy.aws.instance import Instance, place
from tests.deploy.aws.servers import REGION
from tests.deploy.aws.stand_in import TERRAFORM

PREPARE = TERRAFORM / "modules/regional_inference_instance/files/prepare"


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
        # Files are given to the images' user, which root alone may do: here they stay this user's.
        "install": 'a=(); while (($#)); do case $1 in -[og]) shift 2;; *) a+=("$1"); shift;; esac; done; '
        '/usr/bin/install "${a[@]}"',
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


def test_prepare_fetches_secrets_images_and_checkpoints(instances: dict[str, Instance], tmp_path: Path) -> None:
    done, calls = run_prepare(instances["full"], tmp_path)
    assert done.returncode == 0, done.stderr
    secrets = {path.name: path for path in (tmp_path / "run/secrets").iterdir()}
    assert set(secrets) == {"tokens", "hf-token", "tls.crt", "tls.key", "clients.crt"}
    for name, path in secrets.items():
        assert path.read_text() == f"value of /openpi-flash/{name}\n"
        assert path.stat().st_mode & 0o777 == 0o400
        assert f"install -m 0400 -o 10001 -g 10001 /dev/stdin {path}" in calls
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


def test_prepare_makes_both_checkpoints(instances: dict[str, Instance], tmp_path: Path) -> None:
    done, calls = run_prepare(instances["combined"], tmp_path)
    assert done.returncode == 0, done.stderr
    action, planner = (call for call in calls if call.startswith("docker run"))
    arguments = "--output-dir /cache/checkpoints/action --hf-repo lab/jax --required-asset-id trossen"
    assert action.endswith(f" prepare-checkpoint {arguments}")
    assert " prepare-planner-checkpoint --output-dir /cache/checkpoints/planner " in planner


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
