"""Planner cases (`plannerN.npz`): prompt, logits and tokens against those of openpi-flash's planner, in JAX.

Each case brings its own pictures, camera masks and vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from openpi_flash_models.checkpoints.orbax_source import open_jax_source
from openpi_flash_models.config import CAMERAS, ModelConfig
from openpi_flash_models.golden.cases import Case, read_case
from openpi_flash_models.golden.compare import Difference, GoldenModel, largest_difference
from openpi_flash_models.pixels import PIXEL_VALUES
from openpi_flash_models.planner.prompt import GENERATION_PROMPT_FORMAT, Template, generation_prompt
from openpi_flash_models.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from openpi_flash_models.planner.decoder import Batch, Decoder

LOGITS = 1e-4


def check_planners(model: GoldenModel) -> Iterator[Difference]:
    """Every planner file of one model."""
    paths = model.files("planner*.npz")
    if not paths or "jax" not in model.backend_names:
        return
    from openpi_flash_models.planner.decoder import Decoder, load_decoder

    tokenizer = PromptTokenizer(model.path.parent / "tokenizer" / model.description["tokenizer"])
    everything = np.ones(model.config.vocab_size, bool)
    source = open_jax_source(model.path / "checkpoint")
    loaded = load_decoder(model.config, source, everything, device="cpu", precision="float32")
    source.close()
    for path in paths:
        case = read_case(path)
        where = f"{model.path.name}/{path.stem}"
        yield from check_prompt(case, tokenizer, where)
        for quantity, allowed in (("tokens_masked", case["vocab_mask"]), ("tokens_unmasked", everything)):
            decoder = Decoder(model.config, loaded.weights, loaded.device, allowed)
            ids, logits = write(decoder, planner_batch(model.config, case))
            yield Difference(quantity, "planner", where, largest_difference(np.array(ids), case[quantity]), 0)
            if quantity == "tokens_masked":
                found = {"initial_logits": logits[:1], "step_logits": logits[: len(case["step_logits"])]}
                for name, value in found.items():
                    expected = case[name][: len(value)]
                    yield Difference(name, "planner", where, largest_difference(value, expected), LOGITS)
                same = tokenizer.decode(ids) == str(case["text"])
                yield Difference("subtask", "planner", where, 0 if same else float("inf"), 0)


def check_prompt(case: Case, tokenizer: PromptTokenizer, where: str) -> Iterator[Difference]:
    """The tokens that the planner is asked with."""
    template = Template.parse(GENERATION_PROMPT_FORMAT, "task", field="format")
    found = tokenizer.text_tokens(generation_prompt(template, str(case["in_prompt"])), len(case["in_tokens"]))
    expected = case["in_tokens"][case["in_token_mask"]]
    yield Difference("planner prompt", "transforms", where, largest_difference(found, expected), 0)


def write(decoder: Decoder, batch: Batch) -> tuple[list[int], np.ndarray]:
    """Tokens of one row, and the logits (tokens, V) from which each was chosen."""
    draft = decoder.start(batch)
    logits = [np.asarray(draft.written.logits[0])]
    while not draft.is_done:
        draft = decoder.advance(draft, until=len(logits) + 1)
        logits.append(np.asarray(draft.written.logits[0]))
    return draft.token_ids()[0], np.stack(logits)


def planner_batch(config: ModelConfig, case: Case) -> Batch:
    """A case as one row, written greedily, with as many tokens as it has room for."""
    from openpi_flash_models.planner.decoder import Batch

    size = config.vision.image_size
    is_valid = case["prefix_mask"][0, : len(CAMERAS) * config.vision.num_tokens : config.vision.num_tokens]
    images = [
        model_image(case[f"in_image_{camera}"])
        if f"in_image_{camera}" in case
        else np.zeros((size, size, 3), np.float32)
        for camera, valid in zip(CAMERAS, is_valid, strict=True)
        if valid
    ]
    return Batch(
        images=np.stack(images)[None],
        tokens=case["in_tokens"][None],
        token_mask=case["in_token_mask"][None],
        max_tokens=np.array([len(case["token_buffer"])], np.int32),
        temperature=np.zeros(1, np.float32),
        top_k=np.zeros(1, np.int32),
        seeds=np.zeros((1, 2), np.uint32),
    )


def model_image(image: np.ndarray) -> np.ndarray:
    """(size, size, 3) float32 in [-1, 1] of a picture as that planner takes it: bytes, or floats of either range."""
    if image.shape[0] == 3:
        image = image.transpose(1, 2, 0)
    if image.dtype == np.uint8:
        return PIXEL_VALUES[image]
    is_unit = image.min() >= -0.01 and image.max() <= 1.01
    return np.asarray(image * 2 - 1 if is_unit else image, np.float32)
