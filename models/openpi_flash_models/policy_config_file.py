"""Policy configurations from JSON files, for one's own fine-tune or robot. docs/custom-policy.md names every field."""

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any, TypeVar

from openpi_flash_models import realtime
from openpi_flash_models.config import GEMMA_VARIANTS, GemmaConfig, ModelConfig, ModelType, VisionConfig
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.images import ImageLayout
from openpi_flash_models.normalize import Normalization
from openpi_flash_models.policy_configs import PolicyConfig, default_normalization, load_policy_config, pi0, pi05
from openpi_flash_models.robots.aloha import aloha
from openpi_flash_models.robots.base import CameraEntry, Robot, StateEntry, did_you_mean
from openpi_flash_models.robots.droid import DROID
from openpi_flash_models.robots.libero import LIBERO
from openpi_flash_models.robots.raw import raw

_T = TypeVar("_T")
_Enum = TypeVar("_Enum", bound=enum.StrEnum)
_Sizes = TypeVar("_Sizes", VisionConfig, GemmaConfig)

_ROBOTS = ("aloha", "droid", "libero", "raw")
_RAW_KEYS = ("camera_map", "state", "robot_action_dim")
_JSON_TYPES = {dict: "an object", list: "a list", str: "a string", int: "an integer", bool: "true or false"}


def read_policy_config(path: Path) -> PolicyConfig:
    """Reads a configuration file.

    Raises:
        PolicyConfigError: the file is absent or malformed; the message names the entry and what was expected.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyConfigError(f"cannot read the policy configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise PolicyConfigError(f"{path} is not JSON: {error}") from error
    try:
        return _parse(_Section(values), path)
    except (PolicyConfigError, ValueError) as error:
        raise PolicyConfigError(f"{path}: {error}") from error


class _Section:
    """One JSON object, from which entries are taken by name and type. What is not taken is an error."""

    def __init__(self, values: Any, path: str = "") -> None:
        if not isinstance(values, dict):
            raise PolicyConfigError(f"{path or 'the file'}: expected an object, got {json.dumps(values)}")
        self._values: dict[str, Any] = values
        self._path = path
        self._known: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def where(self, key: str) -> str:
        """The entry's place, for errors."""
        return f"{self._path}.{key}" if self._path else key

    def take(self, key: str, *kinds: type, default: Any = None) -> Any:
        """The entry, of one of these JSON types, or `default` where it is absent."""
        self._known.append(key)
        if key not in self:
            return default
        value = self._values[key]
        if type(value) not in kinds:
            expected = " or ".join(_JSON_TYPES[kind] for kind in kinds)
            raise PolicyConfigError(f"{self.where(key)}: expected {expected}, got {json.dumps(value)}")
        return value

    def take_optional(self, key: str, kind: type[_T], default: _T | None = None) -> _T | None:
        """As `take`, but the entry may be null, which is not the same as absent."""
        if key in self and self._values[key] is None:
            self._known.append(key)
            return None
        return self.take(key, kind, default=default)

    def require(self, key: str, *kinds: type) -> Any:
        """The entry, which must be there."""
        if key not in self:
            raise PolicyConfigError(f"{self.where(key)} is missing")
        return self.take(key, *kinds)

    def finish(self) -> None:
        """Refuses what was not taken."""
        for key in self._values:
            if key not in self._known:
                raise PolicyConfigError(f"{self.where(key)}: unknown entry{did_you_mean(key, self._known)}")


def _parse(section: _Section, path: Path) -> PolicyConfig:
    extends = section.take("extends", str)
    base = load_policy_config(extends) if extends else None
    robot = _parse_robot(section, base.robot if base else None)
    model = _parse_model(section, base.model if base else None)
    # Statistics, mask, prompt and metadata of another robot would be silently wrong: then only the model is inherited.
    base = base if base and base.robot.name == robot.name else None
    if base is None and "delta_action_mask" not in section:
        raise PolicyConfigError("delta_action_mask is missing: give a mask, or null where all actions are absolute")

    same_model = base is not None and base.model.model_type is model.model_type
    usual = base.normalization if base and same_model else default_normalization(model.model_type)
    norm_stats, tokenizer = section.take_optional("norm_stats", str), section.take_optional("tokenizer", str)
    config = PolicyConfig(
        name=section.take("name", str, default=path.stem),
        model=model,
        robot=robot,
        normalization=_enum(Normalization, section, "normalization", usual),
        delta_action_mask=_parse_mask(section, base.delta_action_mask if base else None),
        asset_id=section.take_optional("asset_id", str, base.asset_id if base else None),
        norm_stats=path.parent / norm_stats if norm_stats else None,
        default_prompt=section.take_optional("default_prompt", str, base.default_prompt if base else None),
        tokenizer=path.parent / tokenizer if tokenizer else None,
        metadata=section.take("metadata", dict, default=base.metadata if base else {}),
        real_time_chunking=_enum(realtime.Method, section, "real_time_chunking", realtime.Method.GUIDED),
    )
    section.finish()
    return config


def _parse_mask(section: _Section, default: tuple[int, ...] | None) -> tuple[int, ...] | None:
    mask = section.take_optional("delta_action_mask", list, list(default) if default else None)
    if mask is None:
        return None
    if not mask or not all(type(n) is int and n for n in mask):
        raise PolicyConfigError(
            f"delta_action_mask: expected a list of integers, n for n relative and -n for n absolute dimensions, "
            f"e.g. [6, -1], got {json.dumps(mask)}"
        )
    return tuple(mask)


def _parse_robot(section: _Section, base: Robot | None) -> Robot:
    if base is None:
        section.require("robot", str)
    name = section.take("robot", str, default=base.name if base else None)
    if name == "aloha":
        inherited = base is None or base.name != "aloha" or base.encode_state is not None
        return aloha(adapt_to_pi=section.take("adapt_to_pi", bool, default=inherited))
    if name == "raw":
        if base and base.name == "raw" and not any(key in section for key in _RAW_KEYS):
            return base
        return _parse_raw_robot(section)
    if name in {"droid", "libero"}:
        return DROID if name == "droid" else LIBERO
    raise PolicyConfigError(f"robot: no robot {name!r}{did_you_mean(name, _ROBOTS)}")


def _parse_raw_robot(section: _Section) -> Robot:
    camera_map = _Section(section.require("camera_map", dict), "camera_map")
    cameras = []
    for camera in section.take("camera_map", dict):
        value = camera_map.take(camera, str, dict)
        entry = _Section({"path": value} if isinstance(value, str) else value, camera_map.where(camera))
        cameras.append(
            CameraEntry(
                path=entry.require("path", str),
                camera=camera,
                layout=_enum(ImageLayout, entry, "layout", ImageLayout.EITHER),
                required=entry.take("required", bool, default=True),
            )
        )
        entry.finish()
    state = []
    for i, value in enumerate(section.require("state", list)):
        entry = _Section(value, f"state[{i}]")
        state.append(StateEntry(entry.require("path", str), _positive(entry.require("dim", int), entry.where("dim"))))
        entry.finish()
    return raw(tuple(cameras), tuple(state), section.require("robot_action_dim", int))


def _parse_model(section: _Section, base: ModelConfig | None) -> ModelConfig:
    if base is None:
        section.require("model", dict)
    model = _Section(section.take("model", dict, default={}), "model")
    if base is None:
        model.require("model_type", str)
    model_type = _enum(ModelType, model, "model_type", base.model_type if base else ModelType.PI05)
    if base is None or base.model_type is not model_type:
        base = pi0() if model_type is ModelType.PI0 else pi05()
    numbers: dict[str, Any] = {
        key: _positive(model.take(key, int, default=getattr(base, key)), model.where(key))
        for key in ("vocab_size", "action_dim", "action_horizon", "max_token_len")
    }
    config = dataclasses.replace(
        base,
        vision=_parse_sizes(model, "vision", base.vision),
        vlm=_parse_sizes(model, "vlm", base.vlm),
        expert=_parse_sizes(model, "expert", base.expert),
        discrete_state_input=model.take("discrete_state_input", bool, default=base.discrete_state_input),
        **numbers,
    )
    if config.discrete_state_input and not config.is_pi05:
        raise PolicyConfigError("model.discrete_state_input: a pi0 model takes its state as a vector; expected false")
    model.finish()
    return config


def _parse_sizes(model: _Section, key: str, base: _Sizes) -> _Sizes:
    value = model.take(key, dict, str, default={})
    if isinstance(value, str):
        variant = value.removesuffix("_lora")  # the same sizes
        if isinstance(base, VisionConfig) or variant not in GEMMA_VARIANTS:
            raise PolicyConfigError(f"{model.where(key)}: no variant {value!r}{did_you_mean(value, GEMMA_VARIANTS)}")
        return GEMMA_VARIANTS[variant]
    sizes = _Section(value, model.where(key))
    fields = [field.name for field in dataclasses.fields(base)]
    new = {name: _positive(sizes.take(name, int, default=getattr(base, name)), sizes.where(name)) for name in fields}
    sizes.finish()
    return dataclasses.replace(base, **new)


def _enum(kind: type[_Enum], section: _Section, key: str, default: _Enum) -> _Enum:
    value = section.take(key, str, default=default.value)
    try:
        return kind(value)
    except ValueError:
        expected = ", ".join(member.value for member in kind)
        raise PolicyConfigError(f"{section.where(key)}: expected one of {expected}, got {value!r}") from None


def _positive(value: int, where: str) -> int:
    if value < 1:
        raise PolicyConfigError(f"{where}: expected a positive integer, got {value}")
    return value
