"""What deploy/docker/Dockerfile says of its images: which there are, and the environment that each sets."""

import re
import shlex
from pathlib import Path

DOCKERFILE = Path(__file__).parents[2] / "deploy/docker/Dockerfile"


def images() -> set[str]:
    """Stages that have an entry point, of their own or of the stage that they begin with."""
    return {name for name in _stages() if any(words[0] == "ENTRYPOINT" for words in _instructions(name))}


def environment(image: str) -> dict[str, str]:
    """Variables that an image sets, as they are written."""
    assignments = [word for words in _instructions(image) if words[0] == "ENV" for word in words[1:]]
    return dict(word.split("=", 1) for word in assignments)


def _instructions(stage: str) -> list[list[str]]:
    """Of a stage and, before them, of those that it begins with."""
    stages = _stages()
    base, own = stages[stage]
    return [*(_instructions(base) if base in stages else []), *own]


def _stages() -> dict[str, tuple[str, list[list[str]]]]:
    """What each stage begins with, and its instructions, as words."""
    found: dict[str, tuple[str, list[list[str]]]] = {}
    stage = ""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(str.strip, text.splitlines()):
        words = shlex.split(line) if line.startswith("ENV ") else line.split()
        if words[0] == "FROM":
            *_, base, _, stage = words
            found[stage] = (base, [])
        elif stage:
            found[stage][1].append(words)
    return found
