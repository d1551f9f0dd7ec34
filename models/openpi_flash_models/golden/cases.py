"""Model cases (`caseN.npz`): actions, and every quantity on the way to them, in both backends and between them.

openpi's rows carry masked cameras and padded prompts. Ours drop both, so what has a row per prefix token is compared at
openpi's valid positions. The usual number of steps runs with the prompt padded as a policy pads it, all else with the
prompt padded to the model's limit.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from openpi_flash_models import flow
from openpi_flash_models.config import CAMERAS, ModelConfig
from openpi_flash_models.golden.compare import Difference, GoldenModel, largest_difference
from openpi_flash_models.request import Backend, PreparedRequest, ShapeKey, assemble

ACTIONS_TORCH = 2e-5
ACTIONS_JAX = 1e-3
"""openpi's PyTorch embeds the time in float64, as we do; its JAX in float32."""

BETWEEN_BACKENDS = 2e-5
INTERMEDIATES = 1e-4
EMBEDDING_ROUNDING = 1e-7
FEW_STEPS = 4

Case = dict[str, np.ndarray]


def check_cases(model: GoldenModel) -> Iterator[Difference]:
    """Every row of every case of one model, alone."""
    for path in model.files("case*.npz"):
        case = read_case(path)
        where = f"{model.path.name}/{path.stem}"
        yield from check_time(case, where)
        for row in range(len(case["in_tokens"])):
            yield from check_actions(model, case, row, f"{where}[{row}]")
            for backend in model.backends.values():
                yield from check_intermediates(backend, case, row, f"{where}[{row}]")


def check_time(case: Case, where: str) -> Iterator[Difference]:
    """The times of the steps, and their embedding but for its rounding to float32."""
    times = flow.timesteps(len(case["timesteps"]))
    yield Difference("timesteps", "flow", where, largest_difference(times, case["timesteps"]), 0)
    expected = case["time_embedding_f64"]
    value = largest_difference(flow.time_embedding(times, expected.shape[1]), expected)
    yield Difference("time_embedding_f64", "flow", where, value, EMBEDDING_ROUNDING)


def check_actions(model: GoldenModel, case: Case, row: int, where: str) -> Iterator[Difference]:
    """Actions of one row against openpi's, and against each other."""
    usual = len(case["timesteps"])
    expected = [("actions_torch", usual, ACTIONS_TORCH), ("actions", usual, ACTIONS_JAX)]
    expected.append((f"actions_{FEW_STEPS}steps", FEW_STEPS, ACTIONS_JAX))
    actions: dict[int, list[np.ndarray]] = {}
    for num_steps, bucket in ((usual, None), (FEW_STEPS, model.config.max_token_len)):
        batch = assemble([prepared_request(model.config, case, row, num_steps, bucket)])
        actions[num_steps] = [backend.sample_actions(batch)[0] for backend in model.backends.values()]
        if len(model.backends) == 2:
            value = largest_difference(*actions[num_steps])
            yield Difference(f"actions, {num_steps} steps", "torch-jax", where, value, BETWEEN_BACKENDS)
    for quantity, num_steps, tolerance in expected:
        for name, found in zip(model.backends, actions[num_steps], strict=True):
            yield Difference(quantity, name, where, largest_difference(found, case[quantity][row]), tolerance)


def check_intermediates(backend: Backend, case: Case, row: int, where: str) -> Iterator[Difference]:
    """All that openpi's JAX stored on the way to the actions, ours being given its time embeddings.

    Arrays of other names than ours are passed over.
    """
    trace = importlib.import_module(f"openpi_flash_models.{backend.name}.intermediates").intermediates
    config = backend.config
    batch = assemble([prepared_request(config, case, row, len(case["timesteps"]), config.max_token_len)])
    found: dict[str, np.ndarray] = trace(backend, batch, case["time_embedding_f32"])
    for quantity, stored in case.items():
        if match := re.fullmatch(r"vit_base_(\w+)", quantity):
            if not case[f"in_image_mask_{CAMERAS[0]}"][row]:
                continue
            actual, expected = found[f"vit_{match[1]}"][0, 0], stored[row]
        elif match := re.fullmatch(r"(prefix_[kv])_layer(\d+)", quantity):
            actual, expected = at_valid(case, row, found[match[1]][int(match[2]), 0], stored[row])
        elif match := re.fullmatch(r"(prefix_(?:embeds|out))(?:_every(\d+))?", quantity):
            actual, expected = at_valid(case, row, found[match[1]][0], stored[row], stride=int(match[2] or 1))
        elif quantity in found:
            actual, expected = found[quantity][0], stored[row]
        else:
            continue
        yield Difference(quantity, backend.name, where, largest_difference(actual, expected), INTERMEDIATES)


def at_valid(
    case: Case, row: int, actual: np.ndarray, expected: np.ndarray, *, stride: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Ours and openpi's prefix rows at openpi's valid positions, of which `expected` holds every `stride`-th."""
    valid = case["prefix_mask"][row]
    ours = np.cumsum(valid) - 1
    return actual[ours[::stride][valid[::stride]]], expected[valid[::stride]]


def read_case(path: Path) -> Case:
    with np.load(path) as file:
        return dict(file)


def prepared_request(
    config: ModelConfig, case: Case, row: int, num_steps: int, prompt_bucket: int | None = None
) -> PreparedRequest:
    """One row as our policies would hand it to a model, or with the prompt padded further."""
    is_valid = np.array([case[f"in_image_mask_{camera}"][row] for camera in CAMERAS])
    images = np.stack([case[f"in_image_{camera}"][row] for camera in CAMERAS])[is_valid]
    tokens = case["in_tokens"][row][case["in_token_mask"][row]]
    return PreparedRequest(
        images=images,
        tokens=tokens,
        state=case["in_state"][row],
        noise=case["in_noise"][row],
        num_steps=num_steps,
        shape_key=ShapeKey(
            len(images), str(images.dtype), prompt_bucket or config.prompt_bucket(len(tokens)), num_steps
        ),
        deterministic=True,
    )
