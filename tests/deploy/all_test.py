"""What `make test-deploy` makes of its parts."""

from pathlib import Path

import pytest

from tests.deploy.all import MINUTES, Part

ROOT = Path(__file__).parents[2]


@pytest.fixture
def makefile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Makefile").write_text(f"""
passes: ; @true
fails: ; @false
says: ; @echo something
lacks: ; @bash -c 'source {ROOT}/tests/deploy/cannot.sh; cannot no engine here'
hangs: ; @sleep infinity
""")
    monkeypatch.chdir(tmp_path)


def test_what_cannot_run_is_no_failure_and_says_why(makefile, tmp_path):
    assert Part("passes", 60, tmp_path).wait() == "passed"
    assert Part("fails", 60, tmp_path).wait() == "FAILED"
    assert Part("lacks", 60, tmp_path).wait() == "not run: no engine here"


def test_the_output_of_a_quiet_part_comes_at_its_end(makefile, tmp_path, capfd):
    part = Part("says", 60, tmp_path, quiet=True)
    assert part.wait() == "passed"
    assert (tmp_path / "says.log").read_text() == capfd.readouterr().out == "something\n"


def test_a_part_that_hangs_is_stopped(makefile, tmp_path):
    assert Part("hangs", 0.5, tmp_path).wait() == "FAILED: not done within 0 minutes"
    part = Part("hangs", 60, tmp_path)
    part.stop()
    assert part.outcome == "FAILED"


def test_every_part_is_a_target():
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in targets for target in MINUTES)
