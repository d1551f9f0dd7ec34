"""The sources are sound, and variables that contradict each other are refused with a reason."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.aws.prepare_checks import PREPARE
from tests.deploy.aws.servers import ACTION, DIGEST, REGION, SERVERS, module_of
from tests.deploy.aws.stand_in import StandIn, Terraform


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
    "socket": (
        {"extra_config": {"planner_transport": {"unix_socket_path": "/tmp/planner.sock"}}},
        "unix_socket_path is the images' own",
    ),
    "jax_repository": (
        {"action": ACTION, "prepare_checkpoint": True, "action_backend": "jax"},
        "holds model.safetensors: set prep_hf_repo",
    ),
    "environment": ({"environment": {"A": "b c"}}, "hold no spaces"),
    "output_dir": ({"planner_prep_output_dir": "/cache/../etc"}, "expected a path below /cache/"),
    "same_dir": ({"planner_prep_output_dir": "/cache/checkpoints/action"}, "other than prep_output_dir"),
    "tar": ({"planner_prep_tar_path_in_repo": "x.tar.gz"}, "expected the path of an uncompressed .tar"),
    "repo": ({"planner_prep_hf_repo": "pi05; reboot"}, "expected org/repo"),
    "spot": ({"spot": {"max_price_usd": 0}}, "expected a price per hour above 0"),
    "parameter": ({"auth_tokens_parameter": "hunter2"}, "expected a parameter's name"),
}


@pytest.fixture(scope="session")
def complaints(terraform: Terraform, aws: StandIn) -> dict[str, str]:
    """What terraform says of each bad set of variables, and of the good ones, by name.

    Rules that look at one variable come before any that looks at several, and keep those from being tried: hence two
    runs, the second with what the first let pass.
    """
    good = {
        **module_of(aws, {"image_registry": "example.com/flash", "instance_profile": "robots"}),
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
