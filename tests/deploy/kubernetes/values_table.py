"""The table of values in the chart's README, out of the comments of its values.yaml.

`make docs` writes it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHART = Path(__file__).parents[3] / "deploy/helm/openpi-flash"
_KEY = re.compile(r"( *)([\w]+):(?: +(.*))?$")
_START, _END = "<!-- values -->\n", "<!-- /values -->\n"


class Value(NamedTuple):
    """A key of values.yaml.

    Attributes:
        path: e.g. `action.replicas`.
        default: as it is written; empty: a section.
        comment: the lines above it; empty: none.
    """

    path: str
    default: str
    comment: str


def values(text: str) -> Iterator[Value]:
    """Every key, in order."""
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("# "):
            comment.append(line.lstrip()[2:])
        elif match := _KEY.match(line):
            indent, key, default = match.groups()
            path = [*path[: len(indent) // 2], key]
            yield Value(".".join(path), default or "", " ".join(comment))
            comment = []
        else:
            comment = []


def uncommented(path: Path) -> list[str]:
    """Keys that neither have a comment nor are in a section, other than the outermost, that has one."""
    explained: set[str] = set()
    missing = []
    for value in values(path.read_text()):
        parents = {value.path.rsplit(".", n)[0] for n in range(1, value.path.count("."))}
        if value.comment or parents & explained:
            explained.add(value.path)
        elif value.default:
            missing.append(value.path)
    return missing


def readme_with_table(readme: str, path: Path) -> str:
    """The README with the table between its marks made anew."""
    rows = [
        f"| `{value.path}` | {f'`{value.default}`' if value.default else ''} | {value.comment} |\n"
        for value in values(path.read_text())
        if value.comment
    ]
    head, rest = readme.split(_START)
    return head + _START + "| value | default | meaning |\n|---|---|---|\n" + "".join(rows) + _END + rest.split(_END)[1]


if __name__ == "__main__":
    README = CHART / "README.md"
    README.write_text(readme_with_table(README.read_text(), CHART / "values.yaml"))
