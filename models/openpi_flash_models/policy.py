"""A policy: observations of one kind of robot in, action chunks in its units out, one model between."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from openpi_flash_models import flow, realtime
from openpi_flash_models.actions import make_mask, to_absolute, to_delta
from openpi_flash_models.batching import BatchedModel, WarmUpShape
from openpi_flash_models.errors import CheckpointError, InvalidObservationError, ModelsError, PolicyConfigError
from openpi_flash_models.normalize import Normalization, Normalizer, NormStats
from openpi_flash_models.observation import (
    ImageSpec,
    Resizer,
    as_int,
    flatten,
    image_specs,
    parse_prompt,
    parse_seed,
)
from openpi_flash_models.policy_configs import PolicyConfig
from openpi_flash_models.request import Backend, PreparedRequest, ShapeKey, assemble
from openpi_flash_models.tokenizer import PromptTokenizer

MAX_NUM_STEPS = 100
"""Most flow steps that a request may ask for."""


class TensorSpec(NamedTuple):
    """What the policy wants of one numeric entry. `dtype` is what it computes with; other numbers are converted."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    required: bool


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedPolicyRequest:
    """One observation on its way through the model.

    Attributes:
        request: the model's inputs.
        state: (state_dim,) float64, not normalised: what relative actions are relative to.
    """

    request: PreparedRequest
    state: np.ndarray

    @property
    def shape_key(self) -> ShapeKey:
        """What must agree for two requests to share a model call."""
        return self.request.shape_key

    @property
    def deterministic(self) -> bool:
        """Whether it runs alone."""
        return self.request.deterministic


class Policy(BatchedModel):
    """The pipeline around a loaded model. `prepare` and `finish` may run in any thread, `run` and `warm_up` in one.

    Attributes:
        config: the configuration, as it was given.
        backend: the loaded model.
        default_prompt: used when an observation has none; None: the prompt is required.
        default_num_steps: flow steps of a request that names none.
        continues: how a chunk continues the one before it; None: requests that ask for it are refused.
    """

    def __init__(
        self,
        config: PolicyConfig,
        backend: Backend,
        tokenizer: PromptTokenizer,
        stats: Mapping[str, NormStats] | None,
        *,
        default_prompt: str | None = None,
        num_steps: int = flow.DEFAULT_NUM_STEPS,
        max_batch_size: int = 1,
        real_time_chunking: bool = False,
    ) -> None:
        """Puts the parts together.

        Args:
            config: what the policy is.
            backend: its model.
            tokenizer: its vocabulary.
            stats: statistics of `state` and `actions`; None where the configuration does not normalise.
            default_prompt: goes before the configuration's.
            num_steps: flow steps of a request that names none.
            max_batch_size: most requests in a model call.
            real_time_chunking: take requests that continue a chunk, too, and warm up for them.

        Raises:
            CheckpointError: statistics or vocabulary do not fit.
            PolicyConfigError: num_steps or max_batch_size out of range.
        """
        if not 1 <= num_steps <= MAX_NUM_STEPS:
            raise PolicyConfigError(f"num_steps: expected 1 to {MAX_NUM_STEPS}, got {num_steps}")
        if tokenizer.vocab_size > config.model.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, the model's vocabulary {config.model.vocab_size}"
            )
        self.config = config
        self.backend = backend
        self.default_prompt = config.default_prompt if default_prompt is None else default_prompt
        self.default_num_steps = num_steps
        self.continues = config.real_time_chunking if real_time_chunking else None
        self._tokenizer = tokenizer
        self._state_normalizer, self._action_normalizer = _normalizers(config, stats)
        self._delta_mask = make_mask(config.delta_action_mask) if config.delta_action_mask else None
        self._resize = Resizer(config.model.vision.image_size, len(config.robot.used_cameras))
        self._fresh = np.random.default_rng()
        # The shortest prompt is an empty one, with a single digit for each number of the state.
        shortest = self._tokens("", np.full(config.robot.state_dim, -0.99))
        buckets = tuple(n for n in config.model.prompt_buckets if n >= len(shortest))
        super().__init__(max_batch_size, config.robot.view_counts, buckets)

    @property
    def name(self) -> str:
        """Name of the configuration, e.g. `pi05_droid`."""
        return self.config.name

    @property
    def metadata(self) -> Mapping[str, Any]:
        """openpi's metadata of the configuration, as its server sends it."""
        return self.config.metadata

    @property
    def robot_action_dim(self) -> int:
        """Width of one action in the answer."""
        return self.config.robot.action_dim

    @property
    def image_specs(self) -> tuple[ImageSpec, ...]:
        """The cameras that are used, in the model's order."""
        return image_specs(self.config.robot, self.config.model.vision.image_size)

    @property
    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        """The numeric entries; together, in this order, they are the state."""
        return tuple(TensorSpec(entry.path, (entry.dim,), "float64", True) for entry in self.config.robot.state)

    def infer(self, observation: Mapping[str, Any], **options: Any) -> dict[str, np.ndarray]:
        """One observation to one action chunk.

        Args:
            observation: as `prepare` takes it, or nested as openpi's, with the prompt inside under `prompt`.
            options: as those of `prepare`.

        Returns:
            `actions`: (action_horizon, robot_action_dim) float64, in the robot's units.
        """
        entries = flatten(observation)
        prompt = entries.pop("prompt", None)
        prepared = self.prepare(entries, **{"prompt": prompt, **options})
        return self.finish(prepared, self.run([prepared])[0])

    def prepare(
        self,
        observation: Mapping[str, np.ndarray],
        *,
        prompt: str | bytes | np.ndarray | None = None,
        seed: int | None = None,
        noise: np.ndarray | None = None,
        num_steps: int | None = None,
        previous_actions: np.ndarray | None = None,
        inference_delay: int | None = None,
        execution_horizon: int | None = None,
    ) -> PreparedPolicyRequest:
        """Checks an observation and makes the model's inputs of it.

        Args:
            observation: entries by path, e.g. `images/cam_high`, `state`; see `image_specs` and `tensor_specs`.
            prompt: the task in words, also as UTF-8 bytes or a string array of one element; None: the default prompt.
            seed: 0 to 2**64 - 1, for repeatable noise.
            noise: (action_horizon, action_dim), in place of a seed.
            num_steps: flow steps, 1 to 100; None: the policy's default.
            previous_actions: the chunk to be continued, (action_horizon, robot_action_dim) as `finish` gave it; None: a
                chunk that begins afresh. The two numbers below come with it.
            inference_delay: d, steps that will be carried out until the new chunk is there.
            execution_horizon: s, steps of `previous_actions` that had been carried out when the observation was taken:
                row i of the new chunk continues row s + i. At least 1 and d, at most action_horizon - d.

        Raises:
            InvalidObservationError: something is missing, unknown, malformed or out of range; names the entry.
        """
        robot_inputs = self.config.robot.parse(observation)
        state = self._state_normalizer.normalize(robot_inputs.state)
        padded = np.zeros(self.config.model.action_dim, np.float32)
        with np.errstate(over="ignore"):
            padded[: len(state)] = state
        if not np.isfinite(padded).all():
            entry = self.config.robot.state[0].path
            raise InvalidObservationError(entry, "the state is too large: it is infinite once normalised")
        tokens = self._tokens(parse_prompt(prompt, self.default_prompt), state)
        images = self._resize(robot_inputs.images)
        steps = self.default_num_steps if num_steps is None else _parse_num_steps(num_steps)
        continuation = self._continuation(previous_actions, inference_delay, execution_horizon, robot_inputs.state)
        request = PreparedRequest(
            images=images,
            tokens=tokens,
            state=padded,
            noise=self._noise(seed, noise),
            num_steps=steps,
            shape_key=ShapeKey(
                len(images),
                images.dtype.name,
                self.config.model.prompt_bucket(len(tokens)),
                steps,
                self.continues if continuation else None,
            ),
            deterministic=seed is not None or noise is not None,
            continuation=continuation,
        )
        return PreparedPolicyRequest(request, robot_inputs.state)

    def run(self, prepared: Sequence[PreparedPolicyRequest]) -> list[np.ndarray]:
        """Runs the model once for all of these.

        Args:
            prepared: at most `batch_sizes[-1]`, of one shape key; a deterministic one comes alone.

        Returns:
            For each, (action_horizon, action_dim) float32 for `finish`.
        """
        rows = self._rows([item.request for item in prepared])
        return list(self.backend.sample_actions(assemble(rows))[: len(prepared)])

    def finish(self, prepared: PreparedPolicyRequest, model_actions: np.ndarray) -> dict[str, np.ndarray]:
        """Turns the model's actions into the robot's.

        Returns:
            `actions`: (action_horizon, robot_action_dim) float64.

        Raises:
            ModelsError: the model gave NaN or infinity, which no robot should be sent.
        """
        actions = self._action_normalizer.unnormalize(model_actions)
        if self._delta_mask is not None:
            actions = to_absolute(actions, prepared.state, self._delta_mask)
        actions = self.config.robot.decode(actions)
        if not np.isfinite(actions).all():
            raise ModelsError("the model's actions are not finite; its weights or its precision are at fault")
        return {"actions": actions}

    def warm_up_shapes(self) -> list[WarmUpShape]:
        plain = super().warm_up_shapes()
        return plain if self.continues is None else [*plain, *(shape._replace(continues=True) for shape in plain)]

    def _call(self, shape: WarmUpShape) -> None:
        model = self.config.model
        size = model.vision.image_size
        noise = np.zeros((model.action_horizon, model.action_dim), np.float32)
        request = PreparedRequest(
            images=np.zeros((shape.num_views, size, size, 3), np.uint8),
            tokens=np.ones(shape.prompt_bucket, np.int32),
            state=np.zeros(model.action_dim, np.float32),
            noise=noise,
            num_steps=self.default_num_steps,
            shape_key=ShapeKey(
                shape.num_views,
                "uint8",
                shape.prompt_bucket,
                self.default_num_steps,
                self.continues if shape.continues else None,
            ),
            deterministic=False,
            continuation=realtime.Continuation(noise, np.zeros(len(noise), np.float32)) if shape.continues else None,
        )
        self.backend.sample_actions(assemble([request] * shape.batch_size))

    def _tokens(self, prompt: str, state: np.ndarray) -> np.ndarray:
        model = self.config.model
        return self._tokenizer.prompt_tokens(prompt, state if model.discrete_state_input else None, model.max_token_len)

    def _continuation(
        self, previous: object, delay: object, executed: object, state: np.ndarray
    ) -> realtime.Continuation | None:
        """The previous chunk as the model sees it, from the robot's state of now; the inverse of `finish`."""
        if previous is None:
            for name, value in (("inference_delay", delay), ("execution_horizon", executed)):
                if value is not None:
                    raise InvalidObservationError(name, "given without previous_actions, the chunk to be continued")
            return None
        if self.continues is None:
            message = "this policy does not continue chunks: real-time chunking is not switched on"
            raise InvalidObservationError("previous_actions", message)
        horizon, width = self.config.model.action_horizon, self.config.model.action_dim
        actions = _parse_chunk(previous, (horizon, self.robot_action_dim))
        s = _parse_step("execution_horizon", executed, 1, horizon, "the action_horizon")
        d = _parse_step("inference_delay", delay, 0, min(s, horizon - s), f"of {horizon} steps {s} were carried out")
        actions = self.config.robot.encode(actions)
        if self._delta_mask is not None:
            actions = to_delta(actions, state, self._delta_mask)
        left = np.zeros((horizon, width), np.float32)
        with np.errstate(over="ignore"):
            left[: horizon - s, : actions.shape[1]] = self._action_normalizer.normalize(actions[s:])
        if not np.isfinite(left).all():
            raise InvalidObservationError("previous_actions", "too large: infinite once normalised")
        is_guided = self.continues is realtime.Method.GUIDED
        weights = realtime.soft_mask(horizon, d, s) if is_guided else realtime.hard_mask(horizon, d)
        return realtime.Continuation(left, weights)

    def _noise(self, seed: object, noise: np.ndarray | None) -> np.ndarray:
        shape = (self.config.model.action_horizon, self.config.model.action_dim)
        if noise is None:
            generator = self._fresh if seed is None else np.random.default_rng(parse_seed(seed))
            return generator.standard_normal(shape, np.float32)
        if seed is not None:
            raise InvalidObservationError("noise", "seed and noise exclude each other; give one")
        noise = np.asarray(noise)
        if noise.shape != shape:
            raise InvalidObservationError("noise", f"expected shape {shape}, got {noise.shape}")
        if noise.dtype.kind != "f":
            raise InvalidObservationError("noise", f"expected floats, got {noise.dtype}")
        with np.errstate(over="ignore"):
            noise = noise.astype(np.float32, copy=False)
        if not np.isfinite(noise).all():
            raise InvalidObservationError("noise", "expected finite float32 numbers")
        return noise


def _parse_num_steps(value: object) -> int:
    steps = as_int(value)
    if steps is None or not 1 <= steps <= MAX_NUM_STEPS:
        raise InvalidObservationError("num_steps", f"expected an integer from 1 to {MAX_NUM_STEPS}, got {value!r}")
    return steps


def _parse_chunk(value: object, shape: tuple[int, int]) -> np.ndarray:
    try:
        chunk = np.asarray(value)
    except ValueError as error:
        raise InvalidObservationError("previous_actions", f"expected an array ({error})") from error
    if chunk.shape != shape:
        raise InvalidObservationError("previous_actions", f"expected shape {shape}, got {chunk.shape}")
    if chunk.dtype.kind not in "iuf":
        raise InvalidObservationError("previous_actions", f"expected real numbers, got {chunk.dtype}")
    if not np.isfinite(chunk).all():
        row, column = np.argwhere(~np.isfinite(chunk))[0]
        raise InvalidObservationError(
            "previous_actions", f"expected finite numbers; element ({row}, {column}) is {chunk[row, column]}"
        )
    return chunk.astype(np.float64)


def _parse_step(name: str, value: object, least: int, most: int, why: str) -> int:
    step = as_int(value)
    if step is None or not least <= step <= most:
        raise InvalidObservationError(name, f"expected an integer from {least} to {most} ({why}), got {value!r}")
    return step


def _normalizers(config: PolicyConfig, stats: Mapping[str, NormStats] | None) -> tuple[Normalizer, Normalizer]:
    if config.normalization is Normalization.NONE:
        return Normalizer.identity(), Normalizer.identity()
    robot, width = config.robot, config.model.action_dim
    normalizers = []
    for name, dim in (("state", robot.state_dim), ("actions", robot.action_dim)):
        if stats is None or name not in stats:
            raise CheckpointError(f"normalisation statistics of `{name}` are missing")
        length = len(stats[name].mean)
        if not dim <= length <= width:
            raise CheckpointError(
                f"normalisation statistics of `{name}` have {length} numbers; {config.name} needs {dim} to {width}"
            )
        try:
            normalizers.append(Normalizer.from_stats(stats[name], config.normalization))
        except ValueError as error:
            raise CheckpointError(f"normalisation statistics of `{name}`: {error}") from error
    return normalizers[0], normalizers[1]
