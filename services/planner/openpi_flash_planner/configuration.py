"""What of the planner can be changed while it runs."""

import dataclasses
from typing import Self

from openpi_flash.v1 import planner_pb2
from openpi_flash_common.errors import InvalidArgumentError
from openpi_flash_common.settings import PlannerSettings
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.planner.planner import GeneratedSubtask, GenerationOptions
from openpi_flash_models.planner.prompt import Template, action_prompt


@dataclasses.dataclass(frozen=True)
class Configuration:
    """The configuration in force.

    Attributes:
        options: how subtasks are written.
        action_prompt_template: how task and subtask are joined for the action policy.
    """

    options: GenerationOptions
    action_prompt_template: str
    _action_template: Template = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        template = Template.parse(self.action_prompt_template, "task", "subtask", field="action_prompt_template")
        object.__setattr__(self, "_action_template", template)

    @classmethod
    def from_settings(cls, settings: PlannerSettings) -> Self:
        """The configuration that the service starts with."""
        return cls(
            GenerationOptions(
                generation_prompt_format=settings.generation_prompt_format,
                max_generation_tokens=settings.max_generation_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
            ),
            settings.action_prompt_template,
        )

    def action_prompt(self, subtask: GeneratedSubtask) -> str:
        """What the action policy is to be told; empty where the planner wrote nothing."""
        return action_prompt(self._action_template, subtask.task, subtask.text) if subtask.text else ""

    def updated(self, request: planner_pb2.UpdateConfigRequest) -> Self:
        """This configuration with all changes that a request asks for.

        Raises:
            InvalidArgumentError: one of them cannot be; names the field.
        """
        changed = self
        for field, value in request.ListFields():
            try:
                if field.name == "action_prompt_template":
                    changed = dataclasses.replace(changed, action_prompt_template=value)
                else:
                    options = dataclasses.replace(changed.options, **{field.name: value})
                    changed = dataclasses.replace(changed, options=options)
            except PolicyConfigError as error:
                raise InvalidArgumentError(str(error), field.name) from error
        return changed

    def to_proto(self) -> planner_pb2.PlannerConfig:
        """As it is sent."""
        return planner_pb2.PlannerConfig(
            generation_prompt_format=self.options.generation_prompt_format,
            action_prompt_template=self.action_prompt_template,
            max_generation_tokens=self.options.max_generation_tokens,
            temperature=self.options.temperature,
            top_k=self.options.top_k,
        )
