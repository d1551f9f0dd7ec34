"""One end of QUIC by the portal, for a process in a network namespace: `python -m tests.modal_end serve|test STORE`.

STORE is a folder that stands for the Modal Dict, one file of JSON for each key; what is put there is told on standard
output.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from openpi_flash_cli import latency, modal_host


class FolderStore:
    """A Modal Dict's methods on a folder that several processes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, key: str) -> Path:
        return self._folder / quote(key, safe="")

    def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        if skip_if_exists and self._path(key).exists():
            return False
        new = self._folder / f".{quote(key, safe='')}"
        new.write_text(json.dumps(value))
        new.rename(self._path(key))
        print(f"stored {key}", flush=True)
        return True

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return json.loads(self._path(key).read_text())
        except FileNotFoundError:
            return default

    def pop(self, key: str, default: Any = None) -> Any:
        value = self.get(key, default)
        self._path(key).unlink(missing_ok=True)
        return value

    def keys(self) -> list[str]:
        return [unquote(path.name) for path in self._folder.iterdir() if not path.name.startswith(".")]


def main() -> int:
    role, store = sys.argv[1], FolderStore(Path(sys.argv[2]))
    if role == "serve":
        return modal_host.serve_quic(store, stun_servers=())
    modal_host.open_dict = lambda _: store
    parser = argparse.ArgumentParser()
    latency.add_arguments(parser)
    return latency.run(parser.parse_args(["modal-quic", "--timeout", "100"]))


if __name__ == "__main__":
    sys.exit(main())
