"""What of the planner can be changed while it runs."""

from openpi_flash.v1 import planner_pb2
from openpi_flash_common.errors import InvalidArgumentError
from openpi_flash_common.settings import PlannerTuning
from openpi_flash_models.planner.planner import GeneratedSubtask, GenerationOptions
from openpi_flash_models.planner.prompt import Template, action_prompt
from pydantic import ValidationError


class Configuration:
    """The configuration in force. Immutable.

    Whether a value can be is decided by the checks of the settings, at start and at each change alike. `models`, which
    is used without any service and imports none, checks its options again; that both judge alike has a test.

    Attributes:
        tuning: as it was configured; its cadence is the gateway's concern.
        options: how subtasks are written.
    """

    def __init__(self, tuning: PlannerTuning) -> None:
        self.tuning = tuning
        self.options = GenerationOptions(
            generation_prompt_format=tuning.generation_prompt_format,
            max_generation_tokens=tuning.max_generation_tokens,
            temperature=tuning.temperature,
            top_k=tuning.top_k,
        )
        self._action_template = Template.parse(
            tuning.action_prompt_template, "task", "subtask", field="action_prompt_template"
        )

    def action_prompt(self, subtask: GeneratedSubtask) -> str:
        """What the action policy is to be told; empty where the planner wrote nothing."""
        return action_prompt(self._action_template, subtask.task, subtask.text) if subtask.text else ""

    def updated(self, request: planner_pb2.UpdateConfigRequest) -> "Configuration":
        """This configuration with all changes that a request asks for.

        Raises:
            InvalidArgumentError: one of them cannot be; names the field.
        """
        values = {name: getattr(self.tuning, name) for name in PlannerTuning.model_fields}
        try:
            tuning = PlannerTuning(**values | {field.name: value for field, value in request.ListFields()})
        except ValidationError as error:
            problem = error.errors()[0]
            field, message = str(problem["loc"][0]), problem["msg"].removeprefix("Value error, ")
            raise InvalidArgumentError(f"{field}: {message}", field) from error
        return Configuration(tuning)

    def to_proto(self) -> planner_pb2.PlannerConfig:
        """As it is sent."""
        fields = planner_pb2.PlannerConfig.DESCRIPTOR.fields
        return planner_pb2.PlannerConfig(**{field.name: getattr(self.tuning, field.name) for field in fields})
