"""Protobuf messages read no deeper than the gateway needs: the pictures inside are passed on as the bytes they came as.

Only top-level fields are walked. Field numbers come from the generated descriptors, so they follow the .proto files.
Serialized messages of one type that follow each other are, merged, one message: so a body may come in pieces, and
fields can be added to an answer by appending them.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from google.protobuf.message import DecodeError
from openpi_flash.v1 import inference_pb2, planner_pb2, types_pb2
from openpi_flash_common.errors import InvalidArgumentError

Pieces = Sequence[bytes | memoryview]
"""A serialized message, to be joined."""

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class Head:
    """What of an InferRequest decides where it goes."""

    session_id: str
    mode: int


@dataclasses.dataclass(frozen=True)
class Question:
    """What of an InferRequest a planner needs. `prompt` and `seed` are None where they are not set."""

    prompt: str | None
    seed: int | None
    observation: Pieces


@dataclasses.dataclass(frozen=True)
class StreamRequest:
    """An InferStreamRequest with the inference still serialized. `timeout_ms` 0: no deadline."""

    request_id: int
    timeout_ms: int
    traceparent: str
    tracestate: str
    body: Pieces


def read_head(body: Pieces) -> Head:
    """Reads the head of a serialized InferRequest.

    Raises:
        InvalidArgumentError: the bytes are no InferRequest.
    """
    session_id, mode = "", 0
    for piece in body:
        for number, value in _fields(piece):
            if number == _SESSION_ID and isinstance(value, slice):
                session_id = _text(piece[value], "session_id")
            elif number == _MODE and isinstance(value, int):
                mode = value
    return Head(session_id, mode)


def read_question(body: Pieces) -> Question:
    """Reads what a planner needs of a serialized InferRequest; the pictures are not looked at.

    Raises:
        InvalidArgumentError: the bytes are no InferRequest.
    """
    prompt = seed = None
    observation: list[memoryview] = []
    for piece in body:
        view = memoryview(piece)
        for number, value in _fields(piece):
            if number == _SEED and isinstance(value, int):
                seed = value
            elif number == _OBSERVATION and isinstance(value, slice):
                observation.append(view[value])
    for view in observation:
        for number, value in _fields(view):
            if number == _PROMPT and isinstance(value, slice):
                prompt = _text(view[value], "observation.prompt")
    return Question(prompt, seed, observation)


def write_subtask_request(session_id: str, question: Question, default_prompt: str) -> bytes:
    """Serializes a GenerateSubtaskRequest; the pictures are copied once."""
    head = planner_pb2.GenerateSubtaskRequest(session_id=session_id, seed=question.seed)
    if question.prompt is None and default_prompt:
        head.observation.prompt = default_prompt
    length = sum(len(piece) for piece in question.observation)
    return b"".join((head.SerializeToString(), _SUBTASK_OBSERVATION_TAG, _varint_bytes(length), *question.observation))


def write_prompt(prompt: str) -> bytes:
    """A piece that, after the others of a serialized InferRequest, changes its prompt."""
    return inference_pb2.InferRequest(observation=types_pb2.Observation(prompt=prompt)).SerializeToString()


def read_stream_request(data: bytes) -> StreamRequest:
    """Reads an InferStreamRequest without copying the inference.

    Raises:
        InvalidArgumentError: the bytes are no InferStreamRequest.
    """
    request_id = timeout_ms = 0
    traceparent = tracestate = ""
    body: list[memoryview] = []
    view = memoryview(data)
    for number, value in _fields(data):
        if isinstance(value, int):
            if number == _REQUEST_ID:
                request_id = value
            elif number == _TIMEOUT_MS:
                timeout_ms = value & 0xFFFFFFFF
        elif number == _REQUEST:
            body.append(view[value])
        elif number == _TRACEPARENT:
            traceparent = _text(data[value], "traceparent")
        elif number == _TRACESTATE:
            tracestate = _text(data[value], "tracestate")
    return StreamRequest(request_id, timeout_ms, traceparent, tracestate, body)


def write_stream_request(request: StreamRequest) -> bytes:
    """Serializes an InferStreamRequest; the inference is copied once."""
    head = inference_pb2.InferStreamRequest(
        request_id=request.request_id,
        timeout_ms=request.timeout_ms,
        traceparent=request.traceparent,
        tracestate=request.tracestate,
    )
    length = sum(len(piece) for piece in request.body)
    return b"".join((head.SerializeToString(), _REQUEST_TAG, _varint_bytes(length), *request.body))


def read_stream_response(data: bytes) -> tuple[int, memoryview | types_pb2.Error]:
    """Reads an InferStreamResponse: its request id, and the serialized InferResponse or the error.

    Raises:
        DecodeError: the bytes are no InferStreamResponse; the peer is another service, so this is no client's fault.
    """
    request_id, results = 0, []
    try:
        for number, value in _fields(data):
            if number == _REQUEST_ID and isinstance(value, int):
                request_id = value
            elif number in (_RESPONSE, _ERROR) and isinstance(value, slice):
                results.append((number, memoryview(data)[value]))
    except InvalidArgumentError as error:
        raise DecodeError(error.message) from error
    if len(results) != 1:
        raise DecodeError(f"an InferStreamResponse with {len(results)} results")
    number, body = results[0]
    return request_id, body if number == _RESPONSE else types_pb2.Error.FromString(bytes(body))


def write_stream_response(request_id: int, result: bytes | memoryview | types_pb2.Error) -> bytes:
    """Serializes an InferStreamResponse around a serialized InferResponse, or around an error."""
    if isinstance(result, types_pb2.Error):
        return inference_pb2.InferStreamResponse(request_id=request_id, error=result).SerializeToString()
    head = inference_pb2.InferStreamResponse(request_id=request_id).SerializeToString()
    return b"".join((head, _RESPONSE_TAG, _varint_bytes(len(result)), result))


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, int | slice]]:
    """Number and value of each top-level varint (the integer) and length-delimited field (where its bytes are).

    As in protobuf, what is of another wire type than its field is unknown, and unknown fields are passed over. Groups,
    which proto3 does not have, are refused.
    """
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise _malformed("field number 0")
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if kind == _LENGTH_DELIMITED:
            length, position = _varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise _malformed(f"wire type {kind}")
        start, position = position, position + length
        if position > end:
            raise _malformed("truncated")
        if kind == _LENGTH_DELIMITED:
            yield number, slice(start, position)


def _varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    for byte in data[position : position + 10]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
        shift += 7
    raise _malformed("truncated or overlong number")


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _text(data: bytes | memoryview, field: str) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise InvalidArgumentError(f"{field}: not UTF-8", field) from None


def _malformed(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"the request is not a valid protobuf message ({what})")


def _number(message: type, field: str) -> int:
    return message.DESCRIPTOR.fields_by_name[field].number  # type: ignore[attr-defined]


_SESSION_ID = _number(inference_pb2.InferRequest, "session_id")
_MODE = _number(inference_pb2.InferRequest, "mode")
_SEED = _number(inference_pb2.InferRequest, "seed")
_OBSERVATION = _number(inference_pb2.InferRequest, "observation")
_PROMPT = _number(types_pb2.Observation, "prompt")
_SUBTASK_OBSERVATION = _number(planner_pb2.GenerateSubtaskRequest, "observation")
_SUBTASK_OBSERVATION_TAG = bytes([_SUBTASK_OBSERVATION << 3 | _LENGTH_DELIMITED])
_REQUEST_ID = _number(inference_pb2.InferStreamRequest, "request_id")
_TIMEOUT_MS = _number(inference_pb2.InferStreamRequest, "timeout_ms")
_TRACEPARENT = _number(inference_pb2.InferStreamRequest, "traceparent")
_TRACESTATE = _number(inference_pb2.InferStreamRequest, "tracestate")
_REQUEST = _number(inference_pb2.InferStreamRequest, "request")
_REQUEST_TAG = bytes([_REQUEST << 3 | _LENGTH_DELIMITED])
_RESPONSE = _number(inference_pb2.InferStreamResponse, "response")
_RESPONSE_TAG = bytes([_RESPONSE << 3 | _LENGTH_DELIMITED])
_ERROR = _number(inference_pb2.InferStreamResponse, "error")
