"""GitHub's workflows: well-formed, pinned, with the least rights, and thin callers of make."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text())


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.skipif(shutil.which("go") is None, reason="actionlint is built with Go, which is not here")
def test_actionlint():
    subprocess.run(["make", "--no-print-directory", ".cache/bin/actionlint"], cwd=ROOT, check=True)
    subprocess.run([ROOT / ".cache/bin/actionlint", *WORKFLOWS], cwd=ROOT, check=True)


def test_there_are_workflows():
    assert [path.stem for path in WORKFLOWS] == ["ci", "images", "packages"]


def test_actions_are_pinned_to_commits_and_say_which_version_that_is():
    for path in WORKFLOWS:
        lines = [line for line in path.read_text().splitlines() if "uses:" in line]
        assert lines
        for line in lines:
            assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_rights_are_the_least(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        rights = job.get("permissions", {})
        assert set(rights) <= {"contents", "id-token"}
        assert rights.get("contents", "read") == "read"
        uses_identity = any("aws-actions" in step.get("uses", "") for step in job["steps"])
        assert ("id-token" in rights) == uses_identity
    for step in steps(workflow):
        if "actions/checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def test_runs_do_not_pile_up(workflow):
    assert "github.ref" in workflow["concurrency"]["group"]
    assert all(job["timeout-minutes"] <= 120 for job in workflow["jobs"].values())


def test_a_release_is_pushed_as_its_tag_and_does_not_move_latest():
    workflow = yaml.safe_load((ROOT / ".github/workflows/images.yaml").read_text())
    (push,) = [step["env"] for step in steps(workflow) if step.get("run") == "make images"]
    always, chosen = re.findall(r"\$\{\{ (.*?) \}\}", push["TAGS"])
    assert always == "github.sha"
    assert chosen == "github.ref_type == 'tag' && github.ref_name || 'latest'"
    assert re.sub(r"\$\{\{.*?\}\}", "", push["TAGS"]).strip() == ""


def test_commands_are_make_targets(workflow):
    makefile = (ROOT / "Makefile").read_text()
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert commands
    for command in commands:
        target = re.fullmatch(r"make ([a-z-]+)", command)
        assert target, f"{command!r} is no plain call of make"
        assert re.search(rf"^{target[1]}:", makefile, re.MULTILINE), f"make {target[1]} does not exist"
