"""`make docs`: writes docs/configuration.md from the settings' types and from the edge's and the sidecar's own help.

python -m openpi_flash_cli.reference docs/configuration.md
"""

import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from openpi_flash_common.settings import CONFIG_PATH_VARIABLE, EngineSettings, SettingsError
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from openpi_flash_cli.edge import BINARY, BINARY_VARIABLE, find_binary

_INTRODUCTION = f"""\
# Configuration

Made by `make docs` from the settings' types and the programs' own help; a test fails when it is out of date.

The services, the gateway and `openpi-flash` read one JSON file, named by `--config` or `{CONFIG_PATH_VARIABLE}`, and
the environment. A variable overrides a field; it is named after the field's path, with `__` between the parts. An empty
variable counts as unset. Lists, and whole sections such as `OPENPI_GATEWAY__AUTH`, are given as JSON; `null` takes a
section or a value away. Unknown keys are errors, in the file and in variables of a section.

`{BINARY_VARIABLE}` names the QUIC edge's program where it is neither on the path nor beside Python.
`OPENPI_OPEN_LOOP_HORIZON` is read by the Python client, where a policy is made without `open_loop_horizon`.

"""
_NAMES = {str: "text", Path: "path", SecretStr: "secret", int: "integer", float: "number", bool: "true or false"}
_TABLE = ("| field | type | default | meaning | environment variable |", "|---|---|---|---|---|")
_OPTIONS = ("| option | default | meaning | environment variable |", "|---|---|---|---|")


def page(binary: Path) -> str:
    """The whole page.

    Args:
        binary: openpi-flash-transport, which is asked for its help.
    """
    parts = [_INTRODUCTION + "\n".join(["## Top level", "", *_TABLE, *_rows(EngineSettings, (), nested=False)])]
    for name, field in EngineSettings.model_fields.items():
        if section := _section_of(field.annotation):
            about = (section.__doc__ or "").strip()
            parts.append("\n".join([f"## `{name}`", "", about, "", *_TABLE, *_rows(section, (name,))]))
    for command, title in (("server", "The QUIC edge"), ("client", "The sidecar on a robot")):
        about, rows = _options(binary, command)
        heading = [f"## {title}: `{BINARY} {command}`", "", f"{about}."]
        parts.append("\n".join([*heading, "", *_OPTIONS, *rows]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    binary = find_binary()
    if binary is None:
        raise SettingsError(f"no {BINARY}: run `make install`, which builds it")
    Path(sys.argv[1]).write_text(page(binary), encoding="utf-8")


def _rows(section: type[BaseModel], path: tuple[str, ...], *, nested: bool = True) -> Iterator[str]:
    for name, field in section.model_fields.items():
        here = (*path, name)
        inner = _section_of(field.annotation)
        if inner is not None and not nested:
            continue
        variable = "OPENPI_" + "__".join(here).upper()
        if inner is None or type(None) in get_args(field.annotation):
            kind = "section" if inner is not None else _type(field.annotation, field.metadata)
            yield _row(f"`{'.'.join(here)}`", kind, _default(field), field.description or "", f"`{variable}`")
        if inner is not None:
            yield from _rows(inner, here)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds nothing else but null."""
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    is_section = len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel)
    return kinds[0] if is_section else None


def _type(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        members = [_type(member, constraints) for member in arguments if member is not type(None)]
        members += ["null"] if type(None) in arguments else []
        return ("; or " if ", " in members[0] and members[-1] == "null" else " or ").join(members)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if issubclass(annotation, BaseModel):
        fields = (f'"{name}": {_type(field.annotation)}' for name, field in annotation.model_fields.items())
        return f"`{{{', '.join(fields)}}}`"
    return _NAMES[annotation] + _range(constraints)


def _range(constraints: Sequence[Any]) -> str:
    flat = [part for constraint in constraints for part in getattr(constraint, "metadata", [constraint])]
    least = next((part.ge for part in flat if hasattr(part, "ge")), None)
    most = next((part.le for part in flat if hasattr(part, "le")), None)
    if least is None and most is None:
        return ""
    return f", {least} or more" if most is None else f", {least} to {most}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.default
    if isinstance(default, BaseModel):
        return ""
    return "null" if default is None else f"`{json.dumps(default, default=str)}`".replace('"', "")


def _options(binary: Path, command: str) -> tuple[str, list[str]]:
    """What a command of the program says of itself and of each of its options."""
    # A home of another name, and no variables, so that the page is the same wherever it is made.
    run = subprocess.run([binary, command, "--help"], env={"HOME": "~"}, check=True, capture_output=True, text=True)  # noqa: S603
    about, _, text = run.stdout.partition("\n\nUsage:")
    rows = []
    for name, text_and_notes in re.findall(r"^ +(<SERVER>|--[a-z-]+)(?: <\w+>)?\s+(\S.*)$", text, re.MULTILINE):
        notes = dict(re.findall(r" \[(env|default): (.*?)=?\]", text_and_notes))
        default = notes.get("default", "")
        if default and " " not in default:  # a value, no description of one
            default = f"`{default}`"
        meaning = re.sub(r" \[(?:env|default|possible values): .*?\]", "", text_and_notes)
        rows.append(_row(f"`{name}`", default, f"{meaning}.", f"`{notes['env']}`"))
    return about.strip(), rows


if __name__ == "__main__":
    main()
