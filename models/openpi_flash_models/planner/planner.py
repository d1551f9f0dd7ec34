"""A planner: pictures and a task in, a subtask in words out, one model between."""

import dataclasses
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from openpi_flash_models.batching import BatchedModel, WarmUpShape
from openpi_flash_models.errors import InvalidObservationError, PolicyConfigError
from openpi_flash_models.observation import (
    ImageSpec,
    Resizer,
    as_int,
    flatten,
    image_specs,
    parse_prompt,
    parse_seed,
)
from openpi_flash_models.planner.config import PlannerConfig
from openpi_flash_models.planner.decode import CAPACITY
from openpi_flash_models.planner.decoder import Batch, Decoder
from openpi_flash_models.planner.prompt import GENERATION_PROMPT_FORMAT, Template, generation_prompt
from openpi_flash_models.request import pad_tokens
from openpi_flash_models.robots.base import Robot
from openpi_flash_models.tokenizer import PromptTokenizer

MAX_TEMPERATURE = 10.0


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How subtasks are written. Any of it may change from one request to the next at no cost.

    Attributes:
        generation_prompt_format: how the task is put to the model; holds `{task}`.
        max_generation_tokens: most tokens of a subtask, the end token included; 1 to 256.
        temperature: 0: always the likeliest token; up to 10.
        top_k: candidates when sampling; 0: all.

    Raises:
        PolicyConfigError: when made with a value out of range; names the field.
    """

    generation_prompt_format: str = GENERATION_PROMPT_FORMAT
    max_generation_tokens: int = 20
    temperature: float = 0.0
    top_k: int = 0
    template: Template = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        template = Template.parse(self.generation_prompt_format, "task", field="generation_prompt_format")
        object.__setattr__(self, "template", template)
        tokens, top_k, temperature = as_int(self.max_generation_tokens), as_int(self.top_k), self.temperature
        if tokens is None or not 1 <= tokens <= CAPACITY:
            raise PolicyConfigError(
                f"max_generation_tokens: expected 1 to {CAPACITY}, got {self.max_generation_tokens!r}"
            )
        if top_k is None or top_k < 0:
            raise PolicyConfigError(f"top_k: expected at least 0, got {self.top_k!r}")
        if not (math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE):
            raise PolicyConfigError(f"temperature: expected 0 to {MAX_TEMPERATURE:g}, got {temperature!r}")


class PlanKey(NamedTuple):
    """Requests with equal keys can share a model call."""

    num_views: int
    prompt_bucket: int


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedPlan:
    """Model inputs of one request: valid cameras and valid tokens only.

    Attributes:
        images: (num_views, image_size, image_size, 3) uint8; cameras in the model's order.
        tokens: (num_tokens,) int32, no padding.
        task: as it was given, or the default.
        options: how to write.
        seed: of the sampling.
        shape_key: what must agree for two requests to share a model call.
        deterministic: a seed was given: run alone, since a batch of another size may round differently.
    """

    images: np.ndarray
    tokens: np.ndarray
    task: str
    options: GenerationOptions
    seed: int
    shape_key: PlanKey
    deterministic: bool


@dataclasses.dataclass(frozen=True)
class GeneratedSubtask:
    """A subtask, or its beginning.

    Attributes:
        task: for which it was written.
        text: in words, without outer white space.
        token_ids: as the model wrote them, the end token included where it came to one.
        is_whole: false for a beginning.
    """

    task: str
    text: str
    token_ids: tuple[int, ...]
    is_whole: bool

    @property
    def num_tokens(self) -> int:
        """How many tokens the model wrote, and so how often it ran."""
        return len(self.token_ids)


class Planner(BatchedModel):
    """The pipeline around a loaded model. `prepare` may run in any thread, `run`, `stream` and `warm_up` in one.

    Attributes:
        config: the configuration, as it was given.
        decoder: the loaded model.
        default_prompt: used when an observation has none; None: the prompt is required.
    """

    def __init__(
        self,
        config: PlannerConfig,
        decoder: Decoder,
        tokenizer: PromptTokenizer,
        *,
        default_prompt: str | None = None,
        max_batch_size: int = 1,
    ) -> None:
        """Puts the parts together.

        Args:
            config: what the planner is.
            decoder: its model.
            tokenizer: its vocabulary.
            default_prompt: goes before the configuration's.
            max_batch_size: most requests in a model call.

        Raises:
            PolicyConfigError: max_batch_size out of range.
        """
        view_counts = sorted({count for robot in config.robots for count in robot.view_counts})
        super().__init__(max_batch_size, view_counts, config.model.prompt_buckets)
        self.config = config
        self.decoder = decoder
        self.default_prompt = config.default_prompt if default_prompt is None else default_prompt
        self._tokenizer = tokenizer
        self._resize = Resizer(config.model.vision.image_size, max(len(robot.used_cameras) for robot in config.robots))

    @property
    def image_specs(self) -> tuple[ImageSpec, ...]:
        """The cameras that are used. With several robots none is required: it depends on the robot."""
        size, robots = self.config.model.vision.image_size, self.config.robots
        specs = [spec for robot in robots for spec in image_specs(robot, size)]
        return tuple(spec._replace(required=spec.required and len(robots) == 1) for spec in specs)

    def infer(self, observation: Mapping[str, Any], **options: Any) -> GeneratedSubtask:
        """One observation to one subtask.

        Args:
            observation: as `prepare` takes it, or nested as openpi's, with the prompt inside under `prompt`.
            options: as those of `prepare`.
        """
        entries = flatten(observation)
        prompt = entries.pop("prompt", None)
        return self.run([self.prepare(entries, **{"prompt": prompt, **options})])[0]

    def prepare(
        self,
        observation: Mapping[str, np.ndarray],
        *,
        prompt: str | bytes | np.ndarray | None = None,
        options: GenerationOptions | None = None,
        seed: int | None = None,
    ) -> PreparedPlan:
        """Checks an observation and makes the model's inputs of it.

        Args:
            observation: entries by path, e.g. `images/cam_high`. Those of the robot's state are not looked at.
            prompt: the task in words, also as UTF-8 bytes or a string array of one element; None: the default prompt.
            options: how to write; None: the usual.
            seed: 0 to 2**64 - 1, for repeatable sampling.

        Raises:
            InvalidObservationError: something is missing, unknown, malformed or out of range; names the entry.
        """
        options = options or GenerationOptions()
        images = self._resize(self._robot(observation).parse_images(observation))
        task = parse_prompt(prompt, self.default_prompt)
        text = generation_prompt(options.template, task)
        tokens = self._tokenizer.text_tokens(text, self.config.model.max_token_len)
        return PreparedPlan(
            images=images,
            tokens=tokens,
            task=task,
            options=options,
            seed=secrets.randbits(64) if seed is None else parse_seed(seed),
            shape_key=PlanKey(len(images), self.config.model.prompt_bucket(len(tokens))),
            deterministic=seed is not None,
        )

    def run(self, prepared: Sequence[PreparedPlan]) -> list[GeneratedSubtask]:
        """Runs the model for all of these together, until the last of them has ended.

        Args:
            prepared: at most `batch_sizes[-1]`, of one shape key; a deterministic one comes alone.
        """
        draft = self.decoder.advance(self.decoder.start(assemble(self._rows(prepared))))
        return [self._subtask(plan, ids, is_whole=True) for plan, ids in zip(prepared, draft.token_ids(), strict=False)]

    def stream(self, prepared: PreparedPlan) -> Iterator[GeneratedSubtask]:
        """Writes the same subtask as `run` of this one alone, and yields it again with each token that is added.

        The texts begin alike: what a longer one adds can be sent on as it comes. Who stops asking ends the work.
        """
        draft = self.decoder.start(assemble([prepared]))
        while True:
            (ids,), is_whole = draft.token_ids(), draft.is_done
            yield self._subtask(prepared, ids, is_whole=is_whole)
            if is_whole:
                return
            draft = self.decoder.advance(draft, until=len(ids) + 1)

    def _call(self, shape: WarmUpShape) -> None:
        size = self.config.model.vision.image_size
        plan = PreparedPlan(
            images=np.zeros((shape.num_views, size, size, 3), np.uint8),
            tokens=np.ones(shape.prompt_bucket, np.int32),
            task="",
            options=GenerationOptions(max_generation_tokens=2),
            seed=0,
            shape_key=PlanKey(shape.num_views, shape.prompt_bucket),
            deterministic=False,
        )
        self.decoder.advance(self.decoder.start(assemble([plan] * shape.batch_size))).token_ids()

    def _robot(self, observation: Mapping[str, np.ndarray]) -> Robot:
        robots = self.config.robots
        for robot in robots:
            if any(camera.path in observation for camera in robot.used_cameras):
                return robot
        if len(robots) == 1:
            return robots[0]  # whose own complaint says more
        known = "; ".join(f"{robot.name}: {', '.join(entry.path for entry in robot.used_cameras)}" for robot in robots)
        message = f"no camera of a robot that this planner knows ({known}); the observation has "
        raise InvalidObservationError("observation", message + (", ".join(observation) or "nothing"))

    def _subtask(self, plan: PreparedPlan, ids: Sequence[int], *, is_whole: bool) -> GeneratedSubtask:
        return GeneratedSubtask(plan.task, self._tokenizer.decode(ids).strip(), tuple(ids), is_whole)


def assemble(rows: Sequence[PreparedPlan]) -> Batch:
    """Stacks requests of one shape key."""
    tokens, token_mask = pad_tokens([row.tokens for row in rows], rows[0].shape_key.prompt_bucket)
    return Batch(
        images=np.stack([row.images for row in rows]),
        tokens=tokens,
        token_mask=token_mask,
        max_tokens=np.array([row.options.max_generation_tokens for row in rows], np.int32),
        temperature=np.array([row.options.temperature for row in rows], np.float32),
        top_k=np.array([min(row.options.top_k, np.iinfo(np.int32).max) for row in rows], np.int32),
        seeds=np.array([divmod(row.seed, 1 << 32) for row in rows], np.uint32),
    )
