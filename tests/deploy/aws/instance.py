"""What the stand-in keeps of a server: its description and the files of its user data."""

import configparser
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from openpi_flash_common.settings import EngineSettings, load_settings

from tests.deploy import dockerfile


@dataclasses.dataclass(frozen=True)
class Instance:
    """What was made for one server, and the files that its user data writes, by path."""

    outputs: dict[str, Any]
    described: dict[str, Any]
    user_data: str
    files: dict[str, str]

    def unit(self, name: str) -> configparser.RawConfigParser:
        """A systemd unit; lines that a backslash joins are one."""
        unit = configparser.RawConfigParser(strict=False)
        unit.optionxform = str  # type: ignore[assignment, method-assign]
        unit.read_string(self.files[f"/etc/systemd/system/{name}"].replace("\\\n", ""))
        return unit

    def container(self, service: str) -> "Container":
        return Container.parse(self.unit(f"openpi-flash-{service}.service")["Service"]["ExecStart"])

    def settings(self, directory: Path) -> EngineSettings:
        path = directory / "config.json"
        path.write_text(self.files["/etc/openpi-flash/config.json"])
        return load_settings(path, environ=dockerfile.environment("gateway"))


@dataclasses.dataclass(frozen=True)
class Container:
    """A `docker run`, taken apart."""

    options: tuple[tuple[str, str], ...]
    image: str
    command: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> "Container":
        words = shlex.split(line)
        assert words[:2] == ["/usr/bin/docker", "run"]
        options, at = [], 2
        while words[at].startswith("--"):
            value = "" if words[at] in ("--rm", "--read-only") else words[at + 1]
            options.append((words[at], value))
            at += 2 if value else 1
        return cls(tuple(options), words[at], tuple(words[at + 1 :]))

    def all(self, option: str) -> list[str]:
        return [value for name, value in self.options if name == option]

    def one(self, option: str) -> str:
        (value,) = self.all(option)
        return value

    @property
    def environment(self) -> dict[str, str]:
        return dict(text.split("=", 1) for text in self.all("--env"))


def place(root: Path, path: str, content: str, mode: int) -> Path:
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content)
    target.chmod(mode)
    return target
