"""Transforms (`transforms/`): resizing, tokens, normalisation, delta actions and robots, each without a model.

Most must be equal to the bit. `resize_model_side.npz` and `running_*` are of steps that only training takes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from openpi_flash_models.actions import make_mask, to_absolute, to_delta
from openpi_flash_models.config import CAMERAS
from openpi_flash_models.golden.compare import Difference, largest_difference
from openpi_flash_models.images import ImageLayout, parse_image, resize_with_pad
from openpi_flash_models.normalize import Normalization, Normalizer, NormStats
from openpi_flash_models.robots.aloha import aloha, gripper_from_angular, gripper_to_angular
from openpi_flash_models.robots.base import Robot
from openpi_flash_models.robots.droid import DROID
from openpi_flash_models.robots.libero import LIBERO
from openpi_flash_models.tokenizer import PromptTokenizer, discretize_state

FLOAT64_ROUNDING = 1e-12
"""For formulas whose last bit may depend on the processor's library (arcsin)."""

_KINDS = {"meanstd": Normalization.ZSCORE, "quantile": Normalization.QUANTILE}


def check_transforms(folder: Path) -> Iterator[Difference]:
    """Whatever of `transforms/` is there."""
    checks = {
        "resize_pil.npz": check_resizing,
        "normalize.npz": check_normalization,
        "delta_actions.npz": check_delta_actions,
        "robots.npz": check_robots,
    }
    for name, check in checks.items():
        path = folder / "transforms" / name
        if path.is_file():
            with np.load(path) as file:
                yield from check(dict(file), f"transforms/{path.stem}")
    path = folder / "transforms/tokenization.json"
    if path.is_file():
        yield from check_tokenization(json.loads(path.read_text(encoding="utf-8")), folder / "tokenizer")


def check_resizing(arrays: dict[str, np.ndarray], where: str) -> Iterator[Difference]:
    """Pictures scaled by PIL, and floats turned into bytes."""
    for key, image in arrays.items():
        if not key.endswith("_in"):
            continue
        expected = arrays[key.removesuffix("_in") + "_out"]
        if image.dtype == np.uint8:
            yield _exact("resize_with_pad", where, resize_with_pad(image, *expected.shape[-3:-1]), expected)
        else:
            yield _exact("float pictures", where, parse_image(image, ImageLayout.HWC, key), expected)


def check_tokenization(data: dict, folder: Path) -> Iterator[Difference]:
    """Token ids of prompts with and without state, of plain text, and back."""
    where = "transforms/tokenization"
    tokenizer = PromptTokenizer(folder / data["tokenizer"])
    states = [
        np.array([np.nan if value is None else value for value in state], dtype)
        for state, dtype in zip(data["states"], data["state_dtypes"], strict=True)
    ]
    for item in data["items"]:
        state = None if item["state_index"] is None else states[item["state_index"]]
        tokens = tokenizer.prompt_tokens(item["prompt"], state, item["max_len"])
        yield _exact("prompt tokens", where, tokens, np.array(item["tokens"]))
        if state is not None:
            yield _exact("state bins", where, discretize_state(state), np.array(item["discretised"]))
    for item in data["planner"]:
        tokens = np.array(tokenizer.encode(item["text"], bos=True))
        yield _exact("text tokens", where, tokens[: item["max_len"]], np.array(item["tokens"]))
    for item in data["detokenize"]:
        same = tokenizer.decode(item["ids"]) == item["text"]
        yield Difference("decoded text", "transforms", where, 0 if same else float("inf"), 0)


def check_normalization(arrays: dict[str, np.ndarray], where: str) -> Iterator[Difference]:
    """Both formulas and their inverses, on vectors shorter and longer than the statistics."""
    stats = NormStats(**{name: arrays[f"stats_{name}"] for name in ("mean", "std", "q01", "q99")})
    for key, expected in arrays.items():
        if not (match := re.fullmatch(r"(norm|unnorm)_(meanstd|quantile)_(\w+)", key)):
            continue
        direction, kind, case = match.groups()
        normalizer = Normalizer.from_stats(stats, _KINDS[kind])
        if direction == "norm":
            yield _exact("normalize", where, normalizer.normalize(arrays[f"in_{case}"]), expected)
        else:
            yield _exact("unnormalize", where, normalizer.unnormalize(arrays[f"in_un_{case}"]), expected)


def check_delta_actions(arrays: dict[str, np.ndarray], where: str) -> Iterator[Difference]:
    """Masks, and actions made relative and absolute."""
    for key, dims in arrays.items():
        if not key.endswith("_mask_args"):
            continue
        case = key.removesuffix("mask_args")
        mask = make_mask(dims.tolist())
        yield _exact("delta mask", where, mask, arrays[f"{case}mask"])
        state, actions = arrays[f"{case}state"], arrays[f"{case}actions"]
        yield _exact("delta actions", where, to_delta(actions, state, mask), arrays[f"{case}delta"])
        yield _exact("absolute actions", where, to_absolute(actions, state, mask), arrays[f"{case}absolute"])


def check_robots(arrays: dict[str, np.ndarray], where: str) -> Iterator[Difference]:
    """Observations of each robot as the model sees them, and its actions."""
    for case in sorted({match[0] for key in arrays if (match := re.match(r"[a-z]+\d+(?=_)", key))}):
        robot = _robot(case, arrays)
        prefix = f"{case}_in|"
        entries = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        # The prompt is the policy's part, and actions are there only when training.
        sent = {key.replace("|", "/"): entries[key] for key in entries.keys() - {"prompt", "actions"}}
        inputs = robot.parse(sent)
        yield _close(f"{robot.name} state", where, inputs.state, arrays[f"{case}_out|state"])
        cameras = {entry.path: entry.camera for entry in robot.used_cameras}
        images = {cameras[path]: image for path, image in inputs.images}
        for camera in CAMERAS:
            is_valid = np.array(camera in images)
            yield _exact(f"{robot.name} masks", where, is_valid, arrays[f"{case}_out|image_mask|{camera}"])
            if camera in images:
                yield _exact(f"{robot.name} pictures", where, images[camera], arrays[f"{case}_out|image|{camera}"])
        actions = robot.decode(arrays[f"{case}_actions_in"].astype(np.float64))
        yield _close(f"{robot.name} actions", where, actions, arrays[f"{case}_actions_out"])
    if "gripper_in" in arrays:
        found = gripper_to_angular(arrays["gripper_in"])
        yield _close("gripper curves", where, found, arrays["gripper_to_angular"])
        found = gripper_from_angular(arrays["gripper_in"])
        yield _close("gripper curves", where, found, arrays["gripper_from_angular"])


def _robot(case: str, arrays: dict[str, np.ndarray]) -> Robot:
    if case.startswith("aloha"):
        return aloha(adapt_to_pi=bool(arrays[f"{case}_adapt"]))
    return DROID if case.startswith("droid") else LIBERO


def _exact(quantity: str, where: str, actual: np.ndarray, expected: np.ndarray) -> Difference:
    return Difference(quantity, "transforms", where, largest_difference(actual, expected), 0)


def _close(quantity: str, where: str, actual: np.ndarray, expected: np.ndarray) -> Difference:
    return Difference(quantity, "transforms", where, largest_difference(actual, expected), FLOAT64_ROUNDING)
