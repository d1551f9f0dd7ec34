"""openpi's observation dictionaries into InferRequests, and InferResponses into its result dictionaries."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from openpi_flash.v1 import inference_pb2
from openpi_flash_common.codec import tensor_from_proto, tensor_to_proto
from openpi_flash_common.errors import InvalidArgumentError

from openpi_flash_gateway.subtasks import STATUS_NAMES

MODES = {
    "default": inference_pb2.MODE_DEFAULT,
    "subtask_only": inference_pb2.MODE_SUBTASK_ONLY,
    "action_only": inference_pb2.MODE_ACTION_ONLY,
}
"""Names of the modes in an observation dictionary."""

_MAX_UINT32, _MAX_UINT64 = (1 << 32) - 1, (1 << 64) - 1


def request_from_dict(observation: Any) -> tuple[inference_pb2.InferRequest, bool]:
    """Converts a decoded observation.

    Nested maps become names joined by `/`. Arrays, numpy scalars, numbers, bools and lists of numbers become tensors.
    These top-level keys are not part of the observation: `prompt` (str), and, beyond what openpi knows, `mode` (str),
    `session_id` (str), `reset` (bool), `seed` (integer), `noise` (action_horizon, action_dim), `num_steps` (integer),
    `previous_actions` (action_horizon, robot action dims), `inference_delay` and `execution_horizon` (integers).

    Returns:
        The request, and whether its session is to be forgotten first (`reset`).

    Raises:
        InvalidArgumentError: an entry of another kind, naming its path.
    """
    if not isinstance(observation, dict):
        raise InvalidArgumentError(f"the observation is a {type(observation).__name__}; a map is expected")
    request = inference_pb2.InferRequest()
    entries = dict(observation)
    if "prompt" in entries:
        request.observation.prompt = _text(entries.pop("prompt"), "prompt")
    if "session_id" in entries:
        request.session_id = _text(entries.pop("session_id"), "session_id")
    if "mode" in entries:
        request.mode = _mode(entries.pop("mode"))
    is_reset = _flag(entries.pop("reset", False), "reset")
    if "seed" in entries:
        request.seed = _integer(entries.pop("seed"), "seed", _MAX_UINT64)
    if "num_steps" in entries:
        request.num_steps = _integer(entries.pop("num_steps"), "num_steps", _MAX_UINT32)
    if "noise" in entries:
        request.noise.MergeFrom(tensor_to_proto(_array(entries.pop("noise"), "noise").astype(np.float32), "noise"))
    if "previous_actions" in entries:
        chunk = _array(entries.pop("previous_actions"), "previous_actions")
        request.previous_actions.MergeFrom(tensor_to_proto(chunk, "previous_actions"))
    for name in ("inference_delay", "execution_horizon"):
        if name in entries:
            setattr(request, name, _integer(entries.pop(name), name, _MAX_UINT32))
    tensors = request.observation.tensors
    for name, value in _flatten(entries, ""):
        if name in tensors:
            raise InvalidArgumentError(f"{name}: appears twice, nested and as one key", name)
        tensors[name].MergeFrom(tensor_to_proto(_array(value, name), name))
    return request, is_reset


def dict_from_response(response: inference_pb2.InferResponse) -> dict[str, Any]:
    """openpi's result dictionary, without `server_timing`: the arrays, `actions` first, then `policy_timing`.

    Where a planner took part also `subtask`: `text`, `ms`, `status` (`fresh`, `reused`, `failed` or `pending`), and
    where they say something `age_ms` and `error`.
    """
    names = sorted(response.tensors, key=lambda name: (name != "actions", name))
    result: dict[str, Any] = {name: tensor_from_proto(response.tensors[name], name) for name in names}
    result["policy_timing"] = {"infer_ms": response.timing.model_ms}
    if response.HasField("subtask"):
        subtask = response.subtask
        result["subtask"] = {"text": subtask.text, "ms": subtask.ms, "status": STATUS_NAMES[subtask.status]}
        if subtask.age_ms:
            result["subtask"]["age_ms"] = subtask.age_ms
        if subtask.error:
            result["subtask"]["error"] = subtask.error
    return result


def _flatten(entries: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}/")
        else:
            yield name, value


def _array(value: Any, field: str) -> np.ndarray:
    if isinstance(value, np.ndarray | np.generic | bool | int | float | list):
        try:
            array = np.asarray(value)
        except (ValueError, OverflowError):
            raise InvalidArgumentError(f"{field}: a list whose rows differ in length", field) from None
        if array.dtype.kind in "biuf":
            return array
        value = array
    raise InvalidArgumentError(f"{field}: {_kind(value)}; numbers are expected", field)


def _text(value: Any, field: str) -> str:
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:  # openpi's own datasets send np.asarray(prompt)
        value = value.item()
    if isinstance(value, bytes):  # DROID's do
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise InvalidArgumentError(f"{field}: not UTF-8", field) from None
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{field}: {_kind(value)}; a string is expected", field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"{field}: half a surrogate pair, which is no text", field) from None
    return value


def _mode(value: Any) -> inference_pb2.Mode:
    mode = MODES.get(_text(value, "mode"))
    if mode is None:
        raise InvalidArgumentError(f"mode: {value!r} is not one of {', '.join(MODES)}", "mode")
    return mode


def _flag(value: Any, field: str) -> bool:
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{field}: {_kind(value)}; true or false is expected", field)
    return value


def _integer(value: Any, field: str, largest: int) -> int:
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        shown = value if isinstance(value, int | float) else _kind(value)
        raise InvalidArgumentError(f"{field}: {shown}; a whole number from 0 to {largest} is expected", field)
    return value


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with shape {value.shape}"
    return "null" if value is None else f"a {type(value).__name__}"
