"""Observation dictionaries into requests, responses into result dictionaries."""

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict
from openpi_flash.v1 import inference_pb2, types_pb2

from openpi_flash_client.errors import InvalidArgumentError
from openpi_flash_client.pictures import Cameras, pick

MODES = {
    "default": inference_pb2.MODE_DEFAULT,
    "subtask_only": inference_pb2.MODE_SUBTASK_ONLY,
    "action_only": inference_pb2.MODE_ACTION_ONLY,
}

# numpy's names are the wire's.
_DTYPES = {name.removeprefix("DTYPE_").lower(): number for name, number in types_pb2.Dtype.items() if number}
_NAMES = {number: name for name, number in _DTYPES.items()}
_SUBTASK_STATUS = {
    inference_pb2.SUBTASK_STATUS_FRESH: "fresh",
    inference_pb2.SUBTASK_STATUS_REUSED: "reused",
    inference_pb2.SUBTASK_STATUS_FAILED: "failed",
    inference_pb2.SUBTASK_STATUS_PENDING: "pending",
}


def write_request(request: inference_pb2.InferRequest, observation: Mapping[str, Any], cameras: Cameras) -> list[Any]:
    """Fills in a request. Nested maps become names joined by `/`.

    Not part of the observation are the top-level keys `prompt`, `mode`, `seed`, `noise`, `num_steps`,
    `previous_actions`, `inference_delay` and `execution_horizon`.

    Returns:
        the pictures of `cameras`, which are left out: they have to be prepared.

    Raises:
        InvalidArgumentError: an entry or option that cannot be sent, naming it.
    """
    entries = dict(observation)
    mode, seed, noise, num_steps = (entries.pop(name, None) for name in ("mode", "seed", "noise", "num_steps"))
    mode = "default" if mode is None else mode
    if mode not in MODES:
        raise InvalidArgumentError(f"mode: {mode!r} is not one of {', '.join(MODES)}", field="mode")
    request.mode = MODES[mode]
    if seed is not None:
        request.seed = _integer(seed, "seed", 64)
    if num_steps is not None:
        request.num_steps = _integer(num_steps, "num_steps", 32)
    if noise is not None:
        try:
            noise = np.asarray(noise, np.float32)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError("noise: an array of numbers is expected", field="noise") from error
        _write_tensor(request.noise, noise, "noise")
    _write_continuation(request, entries)
    prompt = entries.pop("prompt", None)
    if prompt is not None:
        request.observation.prompt = _text(prompt)
    tensors, pictures = request.observation.tensors, {}
    for name, value in _flatten(entries, ""):
        if name in tensors or name in pictures:
            raise InvalidArgumentError(f"{name}: appears twice, nested and as one key", field=name)
        picture = pick(name, value, cameras[name]) if name in cameras else None
        if picture is not None:
            pictures[name] = picture
        else:
            _write_tensor(tensors[name], value, name)
    return list(pictures.values())


def _write_continuation(request: inference_pb2.InferRequest, entries: dict[str, Any]) -> None:
    previous_actions = entries.pop("previous_actions", None)
    if previous_actions is not None:
        _write_tensor(request.previous_actions, previous_actions, "previous_actions")
    for name in ("inference_delay", "execution_horizon"):
        number = entries.pop(name, None)
        if number is not None:
            setattr(request, name, _integer(number, name, 32))


def read_response(response: inference_pb2.InferResponse) -> dict[str, Any]:
    """The result dictionary: `actions` and other arrays, and where the time went."""
    timing = response.timing
    result: dict[str, Any] = {name: _read_tensor(tensor) for name, tensor in response.tensors.items()}
    result["policy_timing"] = {"infer_ms": timing.model_ms}
    result["server_timing"] = {"infer_ms": timing.total_ms}
    result["timing"] = {field.name: getattr(timing, field.name) for field in types_pb2.Timing.DESCRIPTOR.fields}
    if response.HasField("subtask"):
        subtask = response.subtask
        result["subtask"] = {
            "text": subtask.text,
            "ms": subtask.ms,
            "status": _SUBTASK_STATUS.get(subtask.status, ""),
            "error": subtask.error,
            "age_ms": subtask.age_ms,
        }
    return result


def read_metadata(metadata: inference_pb2.GetMetadataResponse) -> dict[str, Any]:
    """What the server serves, and over it what openpi's own server would send (e.g. `reset_pose`)."""
    facts = MessageToDict(metadata, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    policy = facts.pop("policy_metadata", {})
    return {**facts, **policy}


def _flatten(entries: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}/")
        else:
            yield name, value


def _write_tensor(tensor: types_pb2.Tensor, value: Any, name: str) -> None:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidArgumentError(f"{name}: a list whose rows differ in length", field=name) from error
    if array.dtype.name not in _DTYPES:
        raise InvalidArgumentError(
            f"{name}: {type(value).__name__} of dtype {array.dtype} cannot be sent; numbers are expected", field=name
        )
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    tensor.dtype = _DTYPES[array.dtype.name]  # type: ignore[assignment]
    tensor.shape.extend(array.shape)
    tensor.data = array.tobytes()


def _read_tensor(tensor: types_pb2.Tensor) -> np.ndarray:
    name = _NAMES.get(tensor.dtype, "")
    if name == "bfloat16":  # the upper half of a float32
        wide = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(tuple(tensor.shape))
    return np.frombuffer(tensor.data, np.dtype(name).newbyteorder("<")).reshape(tuple(tensor.shape)).copy()


def _text(prompt: Any) -> str:
    if isinstance(prompt, (np.ndarray, np.generic)) and prompt.ndim == 0:
        prompt = prompt.item()
    try:
        if isinstance(prompt, bytes):
            return prompt.decode()
        if isinstance(prompt, str):
            prompt.encode()
            return prompt
    except UnicodeError as error:
        raise InvalidArgumentError("prompt: not UTF-8 text", field="prompt") from error
    raise InvalidArgumentError(f"prompt: a {type(prompt).__name__}; a string is expected", field="prompt")


def _integer(value: Any, name: str, bits: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 1 << bits:
        raise InvalidArgumentError(f"{name}: {value!r}; a whole number of at most {bits} bits is expected", field=name)
    return number
