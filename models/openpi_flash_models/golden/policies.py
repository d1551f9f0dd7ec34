"""Whole policies (`e2eN_<config>.npz`): raw observations in, a robot's actions out, in both backends."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from openpi_flash_models.config import CAMERAS
from openpi_flash_models.golden.compare import Difference, GoldenModel, largest_difference
from openpi_flash_models.load import find_norm_stats
from openpi_flash_models.policy import Policy
from openpi_flash_models.policy_configs import load_policy_config
from openpi_flash_models.request import Backend, PreparedRequest
from openpi_flash_models.tokenizer import PromptTokenizer

ACTIONS = 1e-4
FLOAT32_ROUNDING = 1e-6
"""Of the normalised state, whose numbers are about 1."""


def check_policies(model: GoldenModel) -> Iterator[Difference]:
    """Every end-to-end file of one model."""
    for path in model.files("e2e*.npz"):
        with np.load(path) as file:
            arrays = dict(file)
        where = f"{model.path.name}/{path.stem}"
        observation = {
            key.removeprefix("obs|").replace("|", "/"): value for key, value in arrays.items() if key.startswith("obs|")
        }
        prompt = observation.pop("prompt", None)
        for name, backend in model.backends.items():
            policy = golden_policy(model, path, backend)
            prepared = policy.prepare(observation, prompt=prompt, noise=arrays["noise"])
            yield from check_inputs(prepared.request, arrays, where)
            model_actions = policy.run([prepared])[0]
            value = largest_difference(model_actions, arrays["model_actions_normalised"])
            yield Difference("policy, normalised actions", name, where, value, ACTIONS)
            actions = policy.finish(prepared, model_actions)["actions"]
            yield Difference("policy, actions", name, where, largest_difference(actions, arrays["actions"]), ACTIONS)


def check_inputs(request: PreparedRequest, arrays: dict[str, np.ndarray], where: str) -> Iterator[Difference]:
    """What reaches the model, against what reached openpi's, of which the pictures are stored by samples and sums."""
    cameras = [camera for camera in CAMERAS if arrays[f"model_in|image_mask|{camera}"]]
    found = {"cameras": (np.array(len(request.images)), np.array(len(cameras)))}
    for camera, image in zip(cameras, request.images, strict=False):
        stored = next(key for key in arrays if key.startswith(f"model_in|image|{camera}|every"))
        stride = int(stored.rpartition("every")[2])
        found[f"samples of {camera}"] = (image[::stride, ::stride], arrays[stored])
        found[f"sum of {camera}"] = (image.sum(dtype=np.int64), arrays[f"model_in|image|{camera}|sum"])
    mask = arrays["model_in|tokenized_prompt_mask"]
    found["tokens"] = (request.tokens, arrays["model_in|tokenized_prompt"][mask])
    for quantity, (actual, expected) in found.items():
        value = largest_difference(actual, expected)
        yield Difference(f"policy, {quantity}", "transforms", where, value, 0)
    value = largest_difference(request.state, arrays["model_in|state"])
    yield Difference("policy, state", "transforms", where, value, FLOAT32_ROUNDING)


def golden_policy(model: GoldenModel, path: Path, backend: Backend) -> Policy:
    """The configuration that the file is named after, at the golden model's sizes."""
    match = re.fullmatch(r"e2e\d+_(\w+)", path.stem)
    if match is None:
        raise ValueError(f"{path}: expected a name such as e2e0_pi05_droid.npz")
    named = load_policy_config(match[1])
    sizes = dataclasses.replace(model.config, discrete_state_input=named.model.discrete_state_input)
    config = dataclasses.replace(named, model=sizes)
    tokenizer = PromptTokenizer(model.path.parent / "tokenizer" / model.description["tokenizer"])
    return Policy(config, backend, tokenizer, find_norm_stats(config, model.path / "checkpoint"))
