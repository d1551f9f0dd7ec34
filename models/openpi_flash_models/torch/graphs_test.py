"""Calls on fixed buffers, with a recorder that replays by calling again."""

import dataclasses

import numpy as np
import pytest
import torch

from openpi_flash_models.request import ModelBatch
from openpi_flash_models.torch.graphs import StaticCalls


class Recorder:
    """Does what a CUDA graph does: whatever a recording reads, it reads where it was when it was recorded."""

    pins_memory = False

    def __init__(self):
        self.recorded = 0

    def record(self, function):
        self.recorded += 1
        result = function()
        return lambda: result.copy_(function()), result

    def run(self, functions):
        for function in functions:
            function()


def batch_of(batch_size=1, *, num_steps=2, seed=0, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    return ModelBatch(
        images=rng.integers(0, 256, (batch_size, 1, 5, 5, 3)).astype(dtype),
        tokens=rng.integers(0, 9, (batch_size, 3), np.int32),
        token_mask=rng.random((batch_size, 3)) < 0.5,
        state=rng.standard_normal((batch_size, 7), np.float32),
        noise=rng.standard_normal((batch_size, 4, 2), np.float32),
        num_steps=num_steps,
    )


def bind(inputs, num_steps):
    def function():
        parts = [inputs.images, inputs.tokens, inputs.token_mask, inputs.state]
        # Of each input a multiple of its own, so that no two can be exchanged.
        total = sum((i + 1) * part.double().flatten(1).sum(1) for i, part in enumerate(parts))
        return (inputs.noise + num_steps * total[:, None, None]).float()

    return function


def expected(batch):
    parts = [batch.images, batch.tokens, batch.token_mask, batch.state]
    total = sum((i + 1) * part.astype(np.float64).reshape(len(part), -1).sum(1) for i, part in enumerate(parts))
    return (batch.noise + batch.num_steps * total[:, None, None]).astype(np.float32)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def calls(recorder):
    return StaticCalls(bind, torch.device("cpu"), recorder, kept=2)


def test_each_call_gets_its_own_answer_from_one_recording(calls, recorder):
    batches = [batch_of(seed=seed) for seed in range(3)]
    answers = [calls(batch) for batch in batches]
    for batch, answer in zip(batches, answers, strict=True):
        np.testing.assert_allclose(answer, expected(batch), rtol=1e-6)
    assert recorder.recorded == 1


@pytest.mark.parametrize(
    "other",
    [
        batch_of(2),
        batch_of(num_steps=3),
        batch_of(dtype=np.float32),
        dataclasses.replace(batch_of(), noise=batch_of().noise[:, :3]),
    ],
    ids=["batch", "steps", "dtype", "horizon"],
)
def test_every_shape_is_recorded(calls, recorder, other):
    for batch in (batch_of(), other, batch_of(seed=1)):
        np.testing.assert_allclose(calls(batch), expected(batch), rtol=1e-6)
    assert recorder.recorded == 2


def test_the_recording_that_was_not_used_for_longest_goes(calls, recorder):
    for size in (1, 2, 1, 3, 1):
        np.testing.assert_allclose(calls(batch_of(size)), expected(batch_of(size)), rtol=1e-6)
    assert recorder.recorded == 3
    calls(batch_of(2))
    assert recorder.recorded == 4


def test_a_shape_that_cannot_be_recorded_is_called_instead_and_others_are_recorded(
    calls, recorder, monkeypatch, caplog
):
    calls(batch_of(1))
    record = recorder.record

    def refuse(function):
        record(function)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "record", refuse)
    answers = [calls(batch_of(2, seed=seed)) for seed in range(3)]
    for seed, answer in enumerate(answers):
        np.testing.assert_allclose(answer, expected(batch_of(2, seed=seed)), rtol=1e-6)
    assert recorder.recorded == 2  # it was tried once
    (warning,) = caplog.records
    assert "(2, 3)" in warning.message
    assert "cannot be recorded: operation not permitted when stream is capturing" in warning.message
    monkeypatch.setattr(recorder, "record", record)
    calls(batch_of(3))
    for size in (2, 3):
        np.testing.assert_allclose(calls(batch_of(size, seed=4)), expected(batch_of(size, seed=4)), rtol=1e-6)
    assert recorder.recorded == 3
    assert len(caplog.records) == 1


def test_what_fails_in_any_case_is_an_error(recorder):
    def fails():
        raise RuntimeError("out of memory")

    calls = StaticCalls(lambda inputs, num_steps: fails, torch.device("cpu"), recorder)
    with pytest.raises(RuntimeError, match="out of memory"):
        calls(batch_of())
