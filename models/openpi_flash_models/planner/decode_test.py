"""Decoding: where it ends and what it costs, rows that do not know of each other, and sampling."""

import dataclasses
import functools
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_flash_models.checkpoints.orbax_source import open_jax_source
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.golden.cases import read_case
from openpi_flash_models.golden.compare import GoldenModel
from openpi_flash_models.golden.planner import planner_batch
from openpi_flash_models.jax import model
from openpi_flash_models.jax.attention import attend
from openpi_flash_models.jax.weights import VLM, abstract_weights
from openpi_flash_models.planner import decode
from openpi_flash_models.planner.decoder import Batch, Decoder, Draft, load_decoder
from openpi_flash_models.planner.vocabulary import EOS

GOLDEN = GoldenModel(Path(__file__).parents[3] / "tests/data/golden/pi05_a")
CASES = [read_case(path) for path in GOLDEN.files("planner*.npz")]


def load(allowed: np.ndarray, precision: str = "float32") -> Decoder:
    source = open_jax_source(GOLDEN.path / "checkpoint")
    return load_decoder(GOLDEN.config, source, allowed, device="cpu", precision=precision)


@pytest.fixture(scope="module")
def golden() -> Decoder:
    return load(CASES[0]["vocab_mask"])


def golden_batch(*indices: int, max_tokens: int = 12) -> Batch:
    rows = [planner_batch(GOLDEN.config, CASES[i]) for i in indices]
    batch = Batch(*(np.concatenate(arrays) for arrays in zip(*rows, strict=True)))
    return batch._replace(max_tokens=np.full(len(rows), max_tokens, np.int32))


def tokens_that_ran(draft: Draft) -> int:
    """Written tokens that the model was run over: those that have keys, behind the prefix."""
    keys = np.asarray(draft.written.caches.keys)[:, :, draft.prefix.valid.shape[1] :]
    return int((np.abs(keys).sum((0, 1, 3, 4)) > 0).sum())


def test_it_stops_at_the_end_token_and_runs_no_further(golden):
    batch = golden_batch(2, max_tokens=decode.CAPACITY)
    draft = golden.advance(golden.start(batch))
    assert draft.token_ids() == [CASES[2]["tokens_masked"].tolist()]
    assert draft.token_ids()[0][-1] == EOS
    assert int(draft.written.steps) == 5
    assert tokens_that_ran(draft) == 4
    assert draft.is_done


@pytest.mark.parametrize("max_tokens", [1, 7])
def test_it_stops_at_the_most_tokens_and_runs_no_further(golden, max_tokens):
    draft = golden.advance(golden.start(golden_batch(0, max_tokens=max_tokens)))
    assert draft.token_ids() == [CASES[0]["tokens_masked"][:max_tokens].tolist()]
    assert int(draft.written.steps) == max_tokens
    assert tokens_that_ran(draft) == max_tokens - 1


def test_rows_do_not_know_of_each_other(golden):
    alone = [golden.advance(golden.start(golden_batch(i))).token_ids()[0] for i in range(3)]
    assert [len(ids) for ids in alone] == [12, 12, 5]
    together = golden_batch(0, 1, 2)._replace(max_tokens=np.array([3, 12, 12], np.int32))
    draft = golden.advance(golden.start(together))
    assert draft.token_ids() == [alone[0][:3], alone[1], alone[2]]
    assert int(draft.written.steps) == 12
    assert not np.asarray(draft.written.tokens)[2, 5:].any()


def test_in_pieces_it_writes_the_same(golden):
    whole = golden.advance(golden.start(golden_batch(0, 2)))
    pieces = golden.start(golden_batch(0, 2))
    for until in (2, 3, 7, decode.CAPACITY):
        pieces = golden.advance(pieces, until=until)
    np.testing.assert_array_equal(pieces.written.tokens, whole.written.tokens)
    np.testing.assert_array_equal(pieces.written.logits, whole.written.logits)


def test_padding_moves_no_position(golden):
    """Positions go on from the number of valid tokens, not from the index of the last one."""
    batch = golden_batch(2)
    expected = golden.advance(golden.start(batch))
    for length in (int(batch.token_mask.sum()), batch.tokens.shape[1] + 40):
        tokens, token_mask = (np.resize(part, (1, length)) for part in (batch.tokens, batch.token_mask))
        tokens[:, batch.token_mask.sum() :], token_mask[:, batch.token_mask.sum() :] = 0, False
        draft = golden.advance(golden.start(batch._replace(tokens=tokens, token_mask=token_mask)))
        assert draft.token_ids() == expected.token_ids()
        np.testing.assert_allclose(draft.written.logits, expected.written.logits, atol=1e-5)


def test_the_most_tokens_compile_nothing(golden):
    for max_tokens in (10, 20):
        golden.advance(golden.start(golden_batch(0, max_tokens=max_tokens)))
    compiled = golden._start._cache_size(), golden._advance._cache_size()
    for max_tokens, temperature, top_k in ((40, 0, 0), (80, 0.5, 0), (256, 2, 7)):
        batch = golden_batch(0, max_tokens=max_tokens)
        batch = batch._replace(temperature=np.float32([temperature]), top_k=np.int32([top_k]))
        golden.advance(golden.start(batch))
    assert (golden._start._cache_size(), golden._advance._cache_size()) == compiled


@pytest.mark.parametrize("stacked", [True, False])
def test_a_full_size_model_has_the_right_shapes_throughout(stacked):
    config = ModelConfig()
    abstract = abstract_weights(config, np.dtype(jnp.bfloat16), stacked=stacked)
    weights = {name: part for name, part in abstract.items() if name in VLM}
    shape = jax.ShapeDtypeStruct
    images, tokens = shape((2, 3, 224, 224, 3), jnp.uint8), shape((2, 32), jnp.int32)
    sampling = decode.Sampling(
        shape((2,), jnp.int32), shape((2,), jnp.float32), shape((2,), jnp.int32), shape((2, 2), jnp.uint32)
    )
    inputs, allowed = decode.Inputs(images, tokens, shape((2, 32), bool)), shape((257152,), bool)
    start = functools.partial(decode.start, config)
    prefix, written = jax.eval_shape(start, weights, inputs, sampling, allowed)
    advance = functools.partial(decode.advance, config)
    until = shape((), jnp.int32)
    later = jax.eval_shape(advance, weights, prefix, written, sampling=sampling, allowed=allowed, until=until)
    assert later == written
    assert later.logits == shape((2, 257152), jnp.float32)
    layers = later.caches if stacked else jax.eval_shape(lambda *caches: jax.tree.map(stack, *caches), *later.caches)
    assert layers.keys == shape((18, 2, 800 + 256, 1, 256), jnp.bfloat16)


def stack(*layers):
    return jnp.stack(layers)


def test_bfloat16_stays_near_float32(golden):
    half = load(CASES[0]["vocab_mask"], "bfloat16")
    assert half.weights["embedding"].dtype == np.uint16
    exact, near = (np.asarray(one.start(golden_batch(0)).written.logits[0]) for one in (golden, half))
    assert np.vdot(exact, near) / np.linalg.norm(exact) / np.linalg.norm(near) >= 0.999
    assert len(half.advance(half.start(golden_batch(0))).token_ids()[0]) == 12


def test_in_bfloat16_logits_are_float32_and_so_have_no_ties_of_rounding():
    half = load(CASES[0]["vocab_mask"], "bfloat16")
    logits = np.asarray(half.start(golden_batch(0)).written.logits[0])
    assert logits.dtype == np.float32
    assert len(np.unique(logits)) == len(logits)
    assert len(np.unique(logits.astype(jnp.bfloat16))) < len(logits)


@pytest.mark.parametrize("block", [64, 100, 512, 8192])
def test_logits_in_blocks_are_the_same(golden, monkeypatch, block):
    monkeypatch.setattr(decode, "_TABLE_BLOCK", block)
    table = golden.weights["embedding"].astype(jnp.bfloat16)
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((3, table.shape[1])), jnp.bfloat16)
    whole = decode.tied_logits({"embedding": table}, hidden)
    bits = {"embedding": jax.lax.bitcast_convert_type(table, jnp.uint16)}
    np.testing.assert_allclose(decode.tied_logits(bits, hidden), whole, atol=1e-5)


choose = jax.jit(decode.choose)


@dataclasses.dataclass(frozen=True)
class Chooser:
    """Many draws from one row of logits, each with a seed of its own."""

    logits: np.ndarray
    allowed: np.ndarray

    def draw(self, count: int, temperature: float, top_k: int = 0, step: int = 0) -> list[int]:
        sampling = decode.Sampling(
            max_tokens=jnp.full(count, 9),
            temperature=jnp.full(count, temperature, jnp.float32),
            top_k=jnp.full(count, top_k),
            seeds=jnp.stack([jnp.zeros(count, jnp.uint32), jnp.arange(count, dtype=jnp.uint32)], 1),
        )
        logits = jnp.broadcast_to(jnp.asarray(self.logits, jnp.float32), (count, len(self.logits)))
        return np.asarray(choose(logits, step, sampling, jnp.asarray(self.allowed))).tolist()


LOGITS = np.array([9.0, 2.0, 3.0, 3.0, -1.0, 2.5])
CHOOSER = Chooser(LOGITS, np.array([False, True, True, True, True, True]))


def test_of_equal_tokens_the_lowest_is_taken_and_disallowed_ones_never():
    assert CHOOSER.draw(1, 0) == [2]
    assert Chooser(LOGITS, np.arange(6) == 4).draw(1, 0) == [4]
    assert 0 not in CHOOSER.draw(500, 10)


@pytest.mark.parametrize("temperature", [0.5, 1, 3])
def test_samples_follow_the_softmax(temperature):
    counts = Counter(CHOOSER.draw(20_000, temperature))
    expected = np.where(CHOOSER.allowed, np.exp(LOGITS / temperature), 0)
    expected /= expected.sum()
    for token, probability in enumerate(expected):
        assert abs(counts[token] / 20_000 - probability) < 0.015


def test_top_k_limits_the_candidates():
    assert set(CHOOSER.draw(500, 5, top_k=3)) == {2, 3, 5}
    assert set(CHOOSER.draw(500, 5, top_k=6)) == {1, 2, 3, 4, 5}
    distinct = Chooser(np.array([0.0, 2.0, 1.0]), np.ones(3, bool))
    assert set(distinct.draw(50, 10, top_k=1)) == {1}


def test_a_little_warmth_is_nearly_greedy():
    distinct = Chooser(np.array([0.0, 2.0, 1.0]), np.ones(3, bool))
    assert set(distinct.draw(200, 1e-30)) == {1}


def test_draws_depend_on_the_seed_and_on_the_step():
    assert CHOOSER.draw(50, 2) == CHOOSER.draw(50, 2)
    assert CHOOSER.draw(50, 2)[:10] == CHOOSER.draw(10, 2)
    assert CHOOSER.draw(50, 2) != CHOOSER.draw(50, 2, step=1)
    assert len(set(CHOOSER.draw(50, 2))) > 2


def test_a_sampled_row_is_the_same_in_company(golden):
    batch = golden_batch(0, 1)._replace(temperature=np.float32([1.5, 0]), seeds=np.array([[3, 4], [5, 6]], np.uint32))
    alone = Batch(*(array[:1] for array in batch))
    together = golden.advance(golden.start(batch)).token_ids()
    assert together[0] == golden.advance(golden.start(alone)).token_ids()[0]
    assert together[0] != CASES[0]["tokens_masked"].tolist()
    assert together[1] == CASES[1]["tokens_masked"].tolist()


def test_layers_in_decoding_are_those_of_the_prefix(golden):
    """Token by token through the cache, or all at once with each seeing those before it."""
    config = GOLDEN.config
    tokens = jnp.array([[2, 300, 301, 302]])
    valid = jnp.ones((1, 4), bool)
    causal = jnp.tril(jnp.ones((4, 4), bool))[:, None]
    rope = model.rope_table(jnp.arange(4)[None], config.vlm.head_dim)
    x = model.embed_prompt(golden.weights, tokens)

    def mix(q, keys, values):
        return attend(q, keys, values, causal), model.Cache(keys, values)

    for i in range(config.vlm.depth):
        x, _ = model.vlm_layer(config.vlm, model.layer_at(golden.weights["vlm_layers"], i), x, rope, mix)
    expected = decode.tied_logits(golden.weights, model.rms_norm(x, 1 + golden.weights["vlm_norm"])[:, -1])

    caches, _ = model.prefix_forward(
        config, golden.weights, model.embed_prompt(golden.weights, tokens[:, :1]), valid[:, :1]
    )
    room = ((0, 0), (0, 0), (0, decode.CAPACITY), (0, 0), (0, 0))
    written = decode.Written(
        tokens=jnp.zeros((1, decode.CAPACITY), jnp.int32).at[:, :3].set(tokens[:, 1:]),
        lengths=jnp.ones(1, jnp.int32),
        done=jnp.zeros(1, bool),
        sound=jnp.ones(1, bool),
        steps=jnp.int32(0),
        logits=expected,
        caches=jax.tree.map(lambda prefix: jnp.pad(prefix, room), caches),
    )
    prefix = decode.Prefix(valid[:, :1], jnp.ones(1, jnp.int32))
    forward = jax.jit(decode.forward, static_argnames="config")
    for steps in (1, 2, 3):
        hidden, caches = forward(config, golden.weights, prefix, written._replace(steps=jnp.int32(steps)))
        written = written._replace(caches=caches)
    np.testing.assert_allclose(decode.tied_logits(golden.weights, hidden), expected, atol=1e-4)
