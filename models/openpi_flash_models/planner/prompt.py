"""Words around a task: as the planner is asked for a subtask, and as the action policy is told of it."""

import dataclasses
import string

from openpi_flash_models.errors import PolicyConfigError

GENERATION_PROMPT_FORMAT = "Task: {task}. Subtask: "
ACTION_PROMPT_TEMPLATE = "{task}. Subtask: {subtask}"

_PUNCTUATION = ".,;:!?"


@dataclasses.dataclass(frozen=True)
class Template:
    """A text with named places in it, e.g. `Task: {task}. Subtask: `. A brace is written twice.

    Attributes:
        parts: literal text, and the name of the place behind it (None at the end).
    """

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str, *names: str, field: str) -> "Template":
        """Takes a text apart.

        Args:
            text: holds each of `names` in braces, and no other.
            names: its places.
            field: name to use in errors.

        Raises:
            PolicyConfigError: it does not.
        """
        expected = " and ".join(f"{{{name}}}" for name in names)
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise PolicyConfigError(f"{field}: no template ({error}); expected a text with {expected}") from error
        places = {name for _, name, _, _ in parsed if name is not None}
        if places != set(names) or any(spec or conversion for _, _, spec, conversion in parsed):
            raise PolicyConfigError(f"{field}: expected a text with {expected} and no other place, got {text!r}")
        return cls(tuple((literal, name) for literal, name, _, _ in parsed))

    def fill(self, **values: str) -> str:
        """The text with its places filled."""
        return "".join(literal + (values[name] if name is not None else "") for literal, name in self.parts)


def generation_prompt(template: Template, task: str) -> str:
    """What the planner reads: the task, cleaned as in its training, in its format."""
    return template.fill(task=clean_task(task))


def action_prompt(template: Template, task: str, subtask: str) -> str:
    """What the action policy reads. Where the template goes on with punctuation, a value brings none of its own.

    "Fold the towel." in `{task}. Subtask: {subtask}` becomes "Fold the towel. Subtask: …", with one full stop.
    """
    values = {"task": task.strip(), "subtask": subtask.strip()}
    filled = ""
    following = [*(literal for literal, _ in template.parts[1:]), ""]
    for (literal, name), after in zip(template.parts, following, strict=True):
        value = values[name] if name is not None else ""
        filled += literal + (value.rstrip(_PUNCTUATION + " ") if after.startswith(tuple(_PUNCTUATION)) else value)
    return filled


def clean_task(task: str) -> str:
    """Lower case, no outer white space, `_` and newlines as spaces, without one punctuation character at its end."""
    task = task.lower().strip().replace("_", " ").replace("\n", " ")
    return task[:-1] if task and task[-1] in string.punctuation else task
