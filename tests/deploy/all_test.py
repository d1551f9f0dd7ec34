"""What `make test-deploy` makes of its parts."""

from pathlib import Path

import pytest

from tests.deploy.all import MINUTES, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def makefile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Makefile").write_text(f"""
passes: ; @true
fails: ; @false
lacks: ; @bash -c 'source {ROOT}/tests/deploy/cannot.sh; cannot no engine here'
hangs: ; @sleep infinity
""")
    monkeypatch.chdir(tmp_path)


def test_what_cannot_run_is_no_failure_and_says_why(makefile):
    assert run("passes", 60) == "passed"
    assert run("fails", 60) == "FAILED"
    assert run("lacks", 60) == "not run: no engine here"


def test_a_part_that_hangs_is_stopped(makefile):
    assert run("hangs", 0.5) == "FAILED: not done within 0 minutes"


def test_every_part_is_a_target():
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in targets for target in MINUTES)
