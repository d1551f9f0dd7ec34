"""Which planner: a pi0.5 model's sizes and the robots whose pictures it takes."""

import dataclasses
from pathlib import Path

from openpi_flash_models.config import ModelConfig
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.policy_configs import load_policy_config, pi05
from openpi_flash_models.robots.aloha import aloha
from openpi_flash_models.robots.base import Robot
from openpi_flash_models.robots.droid import DROID
from openpi_flash_models.robots.libero import LIBERO


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """All that a planner is besides its weights.

    Attributes:
        name: for logs and metadata.
        model: sizes, of a pi0.5 model.
        robots: whose pictures it takes, at least one; an observation is that of the first robot of which it has a
            camera.
        default_prompt: used when an observation has none; None: the prompt is required.
        tokenizer: sentencepiece model; None: PaliGemma's.
    """

    name: str
    model: ModelConfig
    robots: tuple[Robot, ...]
    default_prompt: str | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        if not self.model.is_pi05:
            raise PolicyConfigError(f"{self.name}: a {self.model.model_type} model writes no subtasks; expected pi05")


PI05_SUBTASK = PlannerConfig(name="pi05_subtask", model=pi05(), robots=(aloha(adapt_to_pi=True), DROID, LIBERO))
"""A pi0.5 model of the released sizes for ALOHA, DROID and LIBERO."""


def load_planner_config(name_or_path: str | Path) -> PlannerConfig:
    """`pi05_subtask`, or the model, cameras, default prompt and tokenizer of a policy configuration (also one's own).

    Raises:
        PolicyConfigError: unknown, malformed, or no pi0.5 model.
    """
    if str(name_or_path) == PI05_SUBTASK.name:
        return PI05_SUBTASK
    policy = load_policy_config(name_or_path)
    return PlannerConfig(
        name=policy.name,
        model=policy.model,
        robots=(policy.robot,),
        default_prompt=policy.default_prompt,
        tokenizer=policy.tokenizer,
    )
