"""Logs that people and collectors can read."""

import json
import logging
import sys

import pytest

from openpi_flash_common.logs import setup_logging
from openpi_flash_common.settings import LogSettings
from openpi_flash_common.telemetry import Telemetry, TraceContext

TRACE = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


@pytest.fixture(autouse=True)
def restore_root_logger():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(capsys, **settings) -> list[str]:
    """What a service logs in the course of a request."""
    setup_logging(LogSettings(**settings), "action")
    logger = logging.getLogger("some.module")
    logger.debug("unwanted")
    with Telemetry().request("Infer", TRACE):
        logger.info("loaded %s", "é", extra={"load_ms": 12, "path": "a b\nc"})
    try:
        raise KeyError("lost")
    except KeyError:
        logger.exception("failed")
    return capsys.readouterr().err.splitlines()


def test_text(capsys):
    loaded, failed, *traceback = written(capsys)
    time, rest = loaded.split(" ", 1)
    assert time.endswith("Z")
    assert rest == r'INFO    action loaded é load_ms=12 path="a b\nc" trace_id=0af7651916cd43dd8448eb211c80319c'
    assert failed.endswith("ERROR   action failed")
    assert traceback[-1] == "KeyError: 'lost'"


def test_json_is_one_object_a_line(capsys):
    loaded, failed = map(json.loads, written(capsys, format="json"))
    time = loaded.pop("time")
    assert time.endswith("Z")
    assert loaded == {
        "level": "info",
        "service": "action",
        "logger": "some.module",
        "message": "loaded é",
        "load_ms": 12,
        "path": "a b\nc",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }
    assert "KeyError: 'lost'" in failed["traceback"]
    assert "trace_id" not in failed


def test_level(capsys):
    assert len(written(capsys, level="error", format="json")) == 1
    assert sys.stderr is not None


def test_a_trace_context_that_is_none_is_not_logged(capsys):
    setup_logging(LogSettings(), "action")
    with Telemetry().request("Infer", TraceContext("00-injected\nline")):
        logging.getLogger("x").info("hello")
    assert capsys.readouterr().err.endswith("action hello\n")
