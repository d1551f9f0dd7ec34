"""The table says what was measured, and the measurement runs end to end on an emulated link."""

import argparse
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.link import contenders, photographs, table
from benchmarks.link.contenders import GRPC, MODEL_PICTURES, QUIC, SIDECAR
from benchmarks.link.link import Network
from benchmarks.link.table import Cell, Plan, Setting
from tests.support import needs_links


def test_limit_is_the_round_trip_and_the_bytes_at_the_links_rate() -> None:
    assert Setting(20, 100).limit_ms(3 * 224 * 224 * 3) == pytest.approx(20 + 36.127, abs=1e-3)


def test_p99_of_few_calls_is_the_slowest() -> None:
    assert table.p50_p99([3.0, 1.0, 2.0]) == "2.0 / 3.0"
    assert table.p50_p99([float(ms) for ms in range(1, 1001)]) == "500.0 / 990.0"
    assert table.p50_p99([]) == "-"


def test_doubtful_rows_are_marked_and_say_why() -> None:
    cells = [Cell(Setting(20, 100), "a", 56.1, busy_ms=[60.0]), Cell(Setting(20, 1000), "a", 23.6, doubt="too fast")]
    lines = table.details(cells)
    assert "| a |" in lines[2]
    assert "| a† |" in lines[3]
    assert lines[-1] == "† too fast"


def test_summary_puts_each_measurement_in_its_column() -> None:
    cells = [
        Cell(Setting(20, 100, only_busy=True), "a", 56.1, busy_ms=[60.0], first_ms=[130.0]),
        Cell(Setting(20, 100, "1%"), "a", 56.1, busy_ms=[650.0]),
        Cell(Setting(80, 100, "3%"), "a", 116.1, busy_ms=[999.0]),
    ]
    head, row = (line for line in table.summary(cells) if line.startswith(("|  |", "| a |")))
    shown = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert shown["no loss, busy"] == "60.0 / 60.0"
    assert shown["no loss, first call"] == "130.0 / 130.0"
    assert shown["1% loss"] == "650.0 / 650.0"
    assert shown["3% loss"] == "-"


def test_pictures_change_from_call_to_call() -> None:
    large = np.random.default_rng(1).integers(
        0, 256, (3, 40 + photographs.MARGIN, 50 + photographs.MARGIN, 3), np.uint8
    )
    moments = [photographs.views(large, step) for step in range(200)]
    assert {view.shape for views in moments for view in views} == {(40, 50, 3)}
    assert all((a[0] != b[0]).any() for a, b in itertools.pairwise(moments))


def test_a_contender_that_is_not_built_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "EXTENSION", "no_such_module")
    assert QUIC.missing == "not installed: no_such_module"
    monkeypatch.setattr(contenders, "EXTENSION", "json")
    monkeypatch.setattr(contenders, "transport_binary", lambda: None)
    for contender in (QUIC, SIDECAR):
        assert "OPENPI_FLASH_TRANSPORT_BINARY is not set" in str(contender.missing)
    monkeypatch.setattr(contenders, "transport_binary", lambda: Path("/there"))
    assert QUIC.missing is SIDECAR.missing is None


@needs_links
def test_every_kind_of_call_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = np.zeros((3, 1, 1, 3), np.uint8)
    monkeypatch.setattr(
        photographs, "load", lambda height, width: pictures.repeat(height + 32, 1).repeat(width + 32, 2)
    )
    links = (Setting(20, 100), Setting(80, 100))
    plan = Plan(links, rounds=9, first=1, idle=1, settle=1, busy=2, busy_s=60, lossy_busy_s=60)
    monkeypatch.setattr(table, "QUICK", plan)
    with Network() as network:
        figures, lines = table.run(network, tmp_path, [GRPC], argparse.Namespace(quick=True, rounds=2, minutes=0))
    (cell,) = figures["cells"]
    assert cell["setting"] == dataclasses.asdict(plan.settings[0])
    assert cell["setting"]["pictures"] == MODEL_PICTURES
    assert [len(cell[name]) for name in ("connect_ms", "first_ms", "idle_ms", "busy_ms")] == [2, 2, 2, 4]
    assert min(cell["first_ms"] + cell["idle_ms"] + cell["busy_ms"]) >= cell["limit_ms"]
    assert cell["errors"] == []
    assert cell["link_bytes"] > 1
    assert any(line.startswith("| our gRPC |") for line in lines)
