"""The shallow reader agrees with protobuf on every message, and refuses what protobuf refuses at the top level."""

import contextlib

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from openpi_flash.v1 import inference_pb2, planner_pb2, types_pb2
from openpi_flash_common.errors import InvalidArgumentError

from openpi_flash_gateway import wire


def inference(**fields) -> inference_pb2.InferRequest:
    request = inference_pb2.InferRequest(**fields)
    request.observation.tensors["image"].data = bytes(200_000)
    request.observation.prompt = "go"
    return request


def test_head_is_read_wherever_its_fields_stand():
    request = inference(session_id="röbot", mode=2, seed=1 << 63, num_steps=5, noise=types_pb2.Tensor(data=b"1234"))
    body = request.SerializeToString()
    assert wire.read_head([body]) == wire.Head("röbot", 2)
    late = inference_pb2.InferRequest(session_id="later", mode=3).SerializeToString()
    assert wire.read_head([body + late]) == wire.read_head([body, late]) == wire.Head("later", 3)
    assert wire.read_head([b""]) == wire.read_head([]) == wire.Head("", 0)


def test_what_a_planner_needs_is_read_and_written_as_protobuf_does():
    pieces = [
        inference(seed=3).SerializeToString(),
        inference_pb2.InferRequest(observation=types_pb2.Observation(prompt="stop")).SerializeToString(),
    ]
    merged = inference_pb2.InferRequest.FromString(b"".join(pieces))
    question = wire.read_question(pieces)
    assert (question.prompt, question.seed) == ("stop", 3)
    asked = planner_pb2.GenerateSubtaskRequest.FromString(wire.write_subtask_request("robot", question, "tidy up"))
    expected = planner_pb2.GenerateSubtaskRequest(session_id="robot", seed=3, observation=merged.observation)
    assert asked == expected
    nothing = wire.read_question([inference_pb2.InferRequest(session_id="a").SerializeToString()])
    assert nothing == wire.Question(None, None, [])
    asked = planner_pb2.GenerateSubtaskRequest.FromString(wire.write_subtask_request("", nothing, "tidy up"))
    assert asked == planner_pb2.GenerateSubtaskRequest(observation=types_pb2.Observation(prompt="tidy up"))
    told = inference_pb2.InferRequest.FromString(b"".join([*pieces, wire.write_prompt("go on")]))
    merged.observation.prompt = "go on"
    assert told == merged
    empty = wire.read_question([inference_pb2.InferRequest(observation={"prompt": ""}).SerializeToString()])
    assert empty.prompt == ""


@pytest.mark.parametrize("observation", [b"\x1a\x7f", b"\x1a\x02\xff\xfe"])
def test_an_observation_that_is_none_is_refused(observation):
    body = b"\x32" + bytes([len(observation)]) + observation
    with pytest.raises(InvalidArgumentError):
        wire.read_question([body])


def test_stream_requests_are_read_and_written_as_protobuf_does():
    message = inference_pb2.InferStreamRequest(
        request_id=(1 << 64) - 1, timeout_ms=(1 << 32) - 1, traceparent="00-a", tracestate="b", request=inference()
    )
    read = wire.read_stream_request(message.SerializeToString())
    assert (read.request_id, read.timeout_ms, read.traceparent, read.tracestate) == (
        message.request_id,
        message.timeout_ms,
        "00-a",
        "b",
    )
    assert b"".join(read.body) == message.request.SerializeToString()
    assert inference_pb2.InferStreamRequest.FromString(wire.write_stream_request(read)) == message


def test_a_request_in_pieces_is_merged_as_protobuf_does():
    data = inference_pb2.InferStreamRequest(request_id=1, request=inference(session_id="a")).SerializeToString()
    data += inference_pb2.InferStreamRequest(request=inference_pb2.InferRequest(mode=3)).SerializeToString()
    read = wire.read_stream_request(data)
    assert wire.read_head(read.body) == wire.Head("a", 3)
    written = wire.write_stream_request(read)
    assert inference_pb2.InferStreamRequest.FromString(written) == inference_pb2.InferStreamRequest.FromString(data)


def test_stream_responses_are_read_and_written_as_protobuf_does():
    response = inference_pb2.InferResponse(timing=types_pb2.Timing(model_ms=3))
    answer = inference_pb2.InferStreamResponse(request_id=9, response=response)
    error = inference_pb2.InferStreamResponse(request_id=9, error=types_pb2.Error(code=3, message="no", field="state"))
    empty = inference_pb2.InferStreamResponse(request_id=9, response=inference_pb2.InferResponse())
    for message in (answer, error, empty):
        request_id, result = wire.read_stream_response(message.SerializeToString())
        assert isinstance(result, types_pb2.Error) == message.HasField("error")
        assert inference_pb2.InferStreamResponse.FromString(wire.write_stream_response(request_id, result)) == message


@pytest.mark.parametrize(
    "data", [b"", inference_pb2.InferStreamResponse(request_id=1).SerializeToString(), b"\x12\x05ab", b"\x1a\x01\xff"]
)
def test_an_answer_without_a_result_is_an_error(data):
    with pytest.raises(DecodeError):
        wire.read_stream_response(data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x2a\x05abc", "truncated"),
        (b"\x2a", "truncated"),
        (b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "overlong"),
        (b"\x00\x01", "field number 0"),
        (b"\x2b", "wire type 3"),
        (b"\x1a\x01\xff", "traceparent: not UTF-8"),
        (b"\x29abc", "truncated"),
    ],
)
def test_bytes_that_are_no_request_are_refused(data, problem):
    with pytest.raises(InvalidArgumentError, match=problem):
        wire.read_stream_request(data)


def test_damaged_requests_are_read_as_protobuf_reads_them_or_refused():
    rng = np.random.default_rng(3)
    message = inference_pb2.InferStreamRequest(request_id=5, timeout_ms=20, traceparent="00-a")
    message.request.session_id = "s"
    message.request.observation.prompt = "go"
    original = message.SerializeToString()
    agreed = 0
    for _ in range(5000):
        damaged = bytearray(original)
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        data = bytes(damaged[: rng.integers(1, len(damaged) + 1)])
        try:
            parsed = inference_pb2.InferStreamRequest.FromString(data)
        except DecodeError:
            with contextlib.suppress(InvalidArgumentError):
                wire.read_head(wire.read_stream_request(data).body)  # may be broken where only protobuf looks
            continue
        try:
            read = wire.read_stream_request(data)
        except InvalidArgumentError as error:
            assert "wire type 3" in error.message  # a group
            continue
        assert (read.request_id, read.timeout_ms, read.traceparent) == (
            parsed.request_id,
            parsed.timeout_ms,
            parsed.traceparent,
        )
        assert inference_pb2.InferRequest.FromString(b"".join(read.body)) == parsed.request
        agreed += 1
    assert agreed > 500
