"""Structured logs on standard error: text with key=value pairs for people, one JSON object a line for collectors.

Modules log through `logging` as usual; `extra={"load_ms": 12}` becomes a pair of its own.
"""

import datetime
import json
import logging
import sys
from typing import Any

from openpi_flash_common.settings import LogSettings
from openpi_flash_common.telemetry import current_span

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup_logging(settings: LogSettings, service: str) -> None:
    """Makes the root logger write as configured, in place of what it did before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(service) if settings.format == "json" else _TextFormatter(service))
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)


class _Formatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service

    def time(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def pairs(self, record: logging.LogRecord) -> dict[str, Any]:
        pairs = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if trace_id := current_span().trace_id:
            pairs["trace_id"] = trace_id
        return pairs

    def traceback(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""


class _TextFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {key}={_quote(value)}" for key, value in self.pairs(record).items())
        traceback = self.traceback(record)
        line = f"{self.time(record)} {record.levelname:<7} {self.service} {record.getMessage()}{pairs}"
        return f"{line}\n{traceback}" if traceback else line


class _JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.time(record),
            "level": record.levelname.lower(),
            "service": self.service,
            "logger": record.name,
            "message": record.getMessage(),
            **self.pairs(record),
        }
        if traceback := self.traceback(record):
            entry["traceback"] = traceback
        return json.dumps(entry, default=str, ensure_ascii=False)


def _quote(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or set(text) & set(' "=\n\r\t') else text
