"""What of an openpi observation dictionary arrives where in an InferRequest."""

import numpy as np
import pytest
from openpi_flash.v1 import inference_pb2
from openpi_flash_common.codec import tensor_from_proto, tensor_to_proto
from openpi_flash_common.errors import InvalidArgumentError

from openpi_flash_gateway.observation import dict_from_response, request_from_dict


def test_entries_become_tensors_by_their_path():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    request, _ = request_from_dict(
        {
            "observation/state": np.arange(3, dtype=">f8"),
            "images": {"cam_high": image, "deeper": {"x": np.float32(1.5)}},
            "gripper": 0.5,
            "count": 3,
            "flag": True,
            "rows": [[1, 2], [3, 4]],
            "prompt": "go",
        }
    )
    arrays = {name: tensor_from_proto(tensor, name) for name, tensor in request.observation.tensors.items()}
    expected = {
        "observation/state": np.arange(3.0),
        "images/cam_high": image,
        "images/deeper/x": np.float32(1.5),
        "gripper": np.float64(0.5),
        "count": np.int64(3),
        "flag": np.True_,
        "rows": np.array([[1, 2], [3, 4]]),
    }
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], strict=True)
    assert request.observation.prompt == "go"


def test_reserved_keys_are_fields_of_the_request():
    noise = np.arange(6.0).reshape(2, 3)
    request, _ = request_from_dict(
        {"mode": "action_only", "session_id": "s", "seed": np.int64(7), "noise": noise, "num_steps": 4}
    )
    assert (request.mode, request.session_id, request.seed, request.num_steps) == (
        inference_pb2.MODE_ACTION_ONLY,
        "s",
        7,
        4,
    )
    np.testing.assert_array_equal(tensor_from_proto(request.noise, "noise"), noise.astype(np.float32), strict=True)
    assert not request.observation.tensors
    assert not request.observation.HasField("prompt")


def test_a_previous_chunk_is_no_part_of_the_observation():
    chunk = np.arange(6.0).reshape(2, 3)
    numbers = {"inference_delay": 0, "execution_horizon": np.int64(3)}
    request, _ = request_from_dict({"previous_actions": chunk, **numbers})
    previous = tensor_from_proto(request.previous_actions, "previous_actions")
    np.testing.assert_array_equal(previous, chunk, strict=True)
    assert request.HasField("inference_delay")
    assert (request.inference_delay, request.execution_horizon) == (0, 3)
    assert not request.observation.tensors
    afresh, _ = request_from_dict({"a": 1})
    assert not any(map(afresh.HasField, ("previous_actions", "inference_delay", "execution_horizon")))


def test_reserved_names_are_ordinary_below_the_top_level():
    assert set(request_from_dict({"a": {"mode": 1, "seed": 2}})[0].observation.tensors) == {"a/mode", "a/seed"}


@pytest.mark.parametrize("prompt", ["go", b"go", np.str_("go"), np.array("go"), np.bytes_(b"go")])
def test_prompts_come_in_several_kinds(prompt):
    assert request_from_dict({"prompt": prompt})[0].observation.prompt == "go"


@pytest.mark.parametrize(
    ("observation", "problem", "field"),
    [
        ([1], "the observation is a list; a map is expected", ""),
        ({"a": {"b": None}}, "a/b: null; numbers are expected", "a/b"),
        ({"a": "text"}, "a: a str; numbers are expected", "a"),
        ({"a": b"bytes"}, "a: a bytes; numbers", "a"),
        ({"a": np.array(["x"])}, "a: an array of <U1 with shape", "a"),
        ({"a": [1, "x"]}, "a: an array of <U21", "a"),
        ({"a": [[1], [1, 2]]}, "a: a list whose rows differ", "a"),
        ({"a": [{}]}, "a: an array of object", "a"),
        ({"a": 1 << 70}, "a: an array of object", "a"),
        ({"a/b": 1, "a": {"b": 2}}, "a/b: appears twice", "a/b"),
        ({"prompt": 5}, "prompt: a int; a string is expected", "prompt"),
        ({"prompt": np.array(["a", "b"])}, "prompt: an array of <U1", "prompt"),
        ({"prompt": b"\xff"}, "prompt: not UTF-8", "prompt"),
        ({"prompt": np.array("\ud800")}, "prompt: half a surrogate pair", "prompt"),
        ({"mode": "both"}, "mode: 'both' is not one of default, subtask_only, action_only", "mode"),
        ({"seed": -1}, "seed: -1; a whole number from 0", "seed"),
        ({"seed": True}, "seed: True; a whole number", "seed"),
        ({"seed": 1.5}, "seed: 1.5; a whole number", "seed"),
        ({"num_steps": 1 << 32}, "num_steps: 4294967296; a whole number from 0 to 4294967295", "num_steps"),
        ({"previous_actions": "none"}, "previous_actions: a str; numbers are expected", "previous_actions"),
        ({"inference_delay": -1}, "inference_delay: -1; a whole number", "inference_delay"),
        ({"execution_horizon": 2.5}, "execution_horizon: 2.5; a whole number", "execution_horizon"),
        ({"noise": "loud"}, "noise: a str; numbers are expected", "noise"),
    ],
)
def test_what_cannot_be_used_is_named(observation, problem, field):
    with pytest.raises(InvalidArgumentError, match=problem) as caught:
        request_from_dict(observation)
    assert caught.value.field == field


def test_results_have_openpis_order():
    response = inference_pb2.InferResponse()
    response.tensors["aux"].CopyFrom(tensor_to_proto(np.ones(2)))
    response.tensors["actions"].CopyFrom(tensor_to_proto(np.zeros((2, 3))))
    response.timing.model_ms = 4.5
    result = dict_from_response(response)
    assert list(result) == ["actions", "aux", "policy_timing"]
    assert result["policy_timing"] == {"infer_ms": 4.5}
    np.testing.assert_array_equal(result["actions"], np.zeros((2, 3)), strict=True)
