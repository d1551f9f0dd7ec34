"""The planner from observation to words. Of what is known to be wrong with the public one, none happens here."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models.batching import WarmUpShape
from openpi_flash_models.checkpoints.orbax_source import open_jax_source
from openpi_flash_models.errors import InvalidObservationError, ModelsError, PolicyConfigError
from openpi_flash_models.golden.compare import GoldenModel
from openpi_flash_models.images import resize_with_pad
from openpi_flash_models.planner.config import PI05_SUBTASK, load_planner_config
from openpi_flash_models.planner.decoder import Decoder, load_decoder
from openpi_flash_models.planner.planner import GenerationOptions, PlanKey, Planner, assemble
from openpi_flash_models.planner.vocabulary import EOS, subtask_vocabulary
from openpi_flash_models.tokenizer import PromptTokenizer

GOLDEN = GoldenModel(Path(__file__).parents[3] / "tests/data/golden/pi05_a")
TOKENIZER = PromptTokenizer(GOLDEN.path.parent / "tokenizer/tiny_visible.model")
ALLOWED = subtask_vocabulary(TOKENIZER, GOLDEN.config.vocab_size)
CONFIG = dataclasses.replace(PI05_SUBTASK, model=GOLDEN.config)
LONG = GenerationOptions(max_generation_tokens=60)
TASKS = ("Fold the towel.", "pick up the red cup", "open the drawer", "wipe the table")


@pytest.fixture(scope="module")
def golden_decoder() -> Decoder:
    source = open_jax_source(GOLDEN.path / "checkpoint")
    return load_decoder(GOLDEN.config, source, ALLOWED, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def planner(golden_decoder) -> Planner:
    return Planner(CONFIG, golden_decoder, TOKENIZER, max_batch_size=3)


def picture(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (56, 56, 3), np.uint8)


def droid_observation(seed: int = 0) -> dict[str, np.ndarray]:
    return {
        "observation/exterior_image_1_left": picture(seed, 90, 160, 3),
        "observation/wrist_image_left": picture(seed + 1),
    }


def libero_observation(seed: int = 0) -> dict[str, np.ndarray]:
    return {"observation/image": picture(seed), "observation/wrist_image": picture(seed + 1)}


def aloha_observation(*cameras: str) -> dict[str, np.ndarray]:
    return {f"images/{camera}": picture(i, 3, 56, 56) for i, camera in enumerate(("cam_high", *cameras))}


def first_logits(planner: Planner, observation: dict[str, np.ndarray]) -> np.ndarray:
    prepared = planner.prepare(observation, prompt="fold the towel")
    return np.asarray(planner.decoder.start(assemble([prepared])).written.logits[0])


def test_a_missing_camera_is_dropped_and_not_shown_as_black(planner):
    without = planner.prepare(aloha_observation("cam_right_wrist"), prompt="fold the towel")
    assert without.images.shape == (2, 56, 56, 3)
    assert without.shape_key == PlanKey(2, 32)
    black = aloha_observation("cam_right_wrist") | {"images/cam_left_wrist": np.zeros((3, 56, 56), np.uint8)}
    grey = black | {"images/cam_left_wrist": np.full((3, 56, 56), 0.5)}
    dropped = first_logits(planner, aloha_observation("cam_right_wrist"))
    for made_up in (black, grey):
        assert np.abs(dropped - first_logits(planner, made_up)).max() > 1e-2


@pytest.mark.parametrize(
    "observation",
    [aloha_observation("cam_left_wrist", "cam_right_wrist"), droid_observation(), libero_observation()],
    ids=("aloha", "droid", "libero"),
)
def test_pictures_of_every_robot_reach_the_model(planner, observation):
    prepared = planner.prepare(observation, prompt="fold the towel")
    pictures = [np.moveaxis(image, 0, -1) if len(image) == 3 else image for image in observation.values()]
    expected = [resize_with_pad(image, 56, 56) for image in pictures]
    np.testing.assert_array_equal(prepared.images, expected)
    usual = first_logits(planner, observation)
    for path in observation:
        changed = first_logits(planner, observation | {path: picture(9, *observation[path].shape)})
        assert np.abs(usual - changed).max() > 1e-2


def test_no_byte_marker_or_control_piece_is_ever_written(planner, golden_decoder):
    everything = Decoder(GOLDEN.config, golden_decoder.weights, golden_decoder.device, np.ones(512, bool))
    would_have = set()
    for seed in range(8):
        prepared = planner.prepare(libero_observation(seed), prompt=TASKS[seed % 4], options=LONG)
        (subtask,) = planner.run([prepared])
        assert ALLOWED[list(subtask.token_ids)].all()
        assert subtask.text.isascii()
        assert subtask.text.isprintable()
        would_have |= set(everything.advance(everything.start(assemble([prepared]))).token_ids()[0])
    assert not ALLOWED[list(would_have)].all()


def test_the_end_token_ends_a_subtask_and_is_no_text(planner):
    ended = 0
    for seed in range(8):
        prepared = planner.prepare(libero_observation(seed), prompt=TASKS[seed % 4], options=LONG)
        (subtask,) = planner.run([prepared])
        assert EOS not in subtask.token_ids[:-1]
        assert subtask.num_tokens == len(subtask.token_ids) <= 60
        assert subtask.num_tokens == 60 or subtask.token_ids[-1] == EOS
        assert subtask.text == TOKENIZER.decode([i for i in subtask.token_ids if i != EOS]).strip()
        ended += subtask.token_ids[-1] == EOS
    assert ended


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error_and_no_text(golden_decoder, broken):
    weights = golden_decoder.weights | {"vlm_norm": np.full(GOLDEN.config.vlm.width, broken, np.float32)}
    planner = Planner(CONFIG, Decoder(GOLDEN.config, weights, golden_decoder.device, ALLOWED), TOKENIZER)
    prepared = planner.prepare(libero_observation(), prompt="go")
    with pytest.raises(ModelsError, match="logits are not finite"):
        planner.run([prepared])
    with pytest.raises(ModelsError, match="logits are not finite"):
        next(planner.stream(prepared))


def test_requests_are_batched_without_knowing_of_each_other(planner):
    prepared = [
        planner.prepare(libero_observation(i), prompt=task, options=GenerationOptions(max_generation_tokens=5 + 9 * i))
        for i, task in enumerate(TASKS[:3])
    ]
    alone = [planner.run([one])[0] for one in prepared]
    assert planner.run(prepared) == alone
    assert planner.run(prepared[:2]) == alone[:2]
    assert len({subtask.token_ids for subtask in alone}) == 3


def test_streaming_gives_what_the_loop_gives_token_by_token(planner):
    hot = GenerationOptions(max_generation_tokens=20, temperature=1.0, top_k=40)
    for options, seed in ((LONG, None), (GenerationOptions(max_generation_tokens=1), None), (hot, 5)):
        prepared = planner.prepare(libero_observation(2), prompt="open the drawer", options=options, seed=seed)
        (whole,) = planner.run([prepared])
        parts = list(planner.stream(prepared))
        assert parts[-1] == whole
        assert [part.is_whole for part in parts] == [*[False] * (whole.num_tokens - 1), True]
        assert [part.num_tokens for part in parts] == list(range(1, whole.num_tokens + 1))
        assert all(later.text.startswith(part.text) for part, later in itertools.pairwise(parts))


def test_who_stops_listening_ends_the_work(planner, monkeypatch):
    calls = []
    advance = planner.decoder.advance
    monkeypatch.setattr(planner.decoder, "advance", lambda *args, **kwargs: calls.append(1) or advance(*args, **kwargs))
    stream = planner.stream(planner.prepare(libero_observation(), prompt="go", options=LONG))
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(calls) == 2


def test_a_seed_repeats_a_sample(planner):
    hot = GenerationOptions(max_generation_tokens=12, temperature=2.0)
    observation = libero_observation() | {"prompt": "fold the towel"}
    first, again = (planner.infer(observation, options=hot, seed=2**64 - 1) for _ in range(2))
    assert first == again
    others = {planner.infer(observation, options=hot, seed=seed).token_ids for seed in (0, 1, 2**32)}
    assert len(others | {first.token_ids}) == 4
    assert planner.infer(observation, options=hot) != planner.infer(observation, options=hot)
    assert planner.infer(observation) == planner.infer(observation)


def test_a_batch_is_of_one_shape_and_of_none_with_a_seed(planner):
    libero, aloha = (planner.prepare(each, prompt="go") for each in (libero_observation(), aloha_observation()))
    seeded = planner.prepare(libero_observation(), prompt="go", seed=1)
    assert seeded.deterministic
    for batch, message in (
        ([libero, aloha], "one shape key"),
        ([libero, seeded], "runs alone"),
        ([libero] * 4, "4 requests in a batch of at most 3"),
        ([], "one shape key"),
    ):
        with pytest.raises(ValueError, match=message):
            planner.run(batch)


def test_the_task_is_put_as_in_training_or_as_told(planner):
    usual = planner.prepare(libero_observation(), prompt=b" Fold_the Towel.\n")
    assert TOKENIZER.decode(usual.tokens) == "Task: fold the towel. Subtask: "
    options = GenerationOptions(generation_prompt_format="What next? {task}!")
    told = planner.prepare(libero_observation(), prompt="Fold the towel", options=options)
    assert TOKENIZER.decode(told.tokens) == "What next? fold the towel!"
    assert len(planner.prepare(libero_observation(), prompt="open the drawer and " * 60).tokens) == 200


def test_a_default_prompt_stands_in(planner):
    with pytest.raises(InvalidObservationError, match="prompt: required prompt is missing"):
        planner.prepare(libero_observation())
    polite = Planner(CONFIG, planner.decoder, TOKENIZER, default_prompt="fold the towel")
    assert TOKENIZER.decode(polite.prepare(libero_observation()).tokens) == "Task: fold the towel. Subtask: "


def test_the_state_is_not_looked_at(planner):
    state = {"observation/state": np.full(3, np.nan)}
    prepared = planner.prepare(libero_observation() | state, prompt="go")
    np.testing.assert_array_equal(prepared.images, planner.prepare(libero_observation(), prompt="go").images)


@pytest.mark.parametrize(
    ("observation", "field", "message"),
    [
        ({}, "observation", "no camera of a robot that this planner knows .* has nothing"),
        ({"camera": picture(0)}, "observation", "libero: observation/image, .* has camera"),
        ({"observation/image": picture(0)}, "observation/wrist_image", "required camera is missing"),
        ({"images/cam_left_wrist": picture(0, 3, 8, 8)}, "images/cam_high", "required camera is missing"),
        (libero_observation() | {"observation/imgae": picture(0)}, "observation/imgae", "unknown entry"),
        (libero_observation() | droid_observation(), "observation/image", "unknown entry"),
        (libero_observation() | {"observation/image": np.full((8, 8, 3), np.nan)}, "observation/image", "floats in"),
        (libero_observation() | {"observation/image": np.zeros((8, 8, 4))}, "observation/image", "RGB"),
        (libero_observation() | {"observation/image": np.zeros((9000, 1, 3))}, "observation/image", "too thin"),
    ],
)
def test_what_is_wrong_with_an_observation_is_named(planner, observation, field, message):
    with pytest.raises(InvalidObservationError, match=message) as caught:
        planner.prepare(observation, prompt="go")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_generation_tokens", 0),
        ("max_generation_tokens", 257),
        ("max_generation_tokens", 2.5),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", 11),
        ("top_k", -1),
        ("generation_prompt_format", "Task: {tusk}"),
    ],
)
def test_options_out_of_range_are_named(field, value):
    with pytest.raises(PolicyConfigError, match=f"^{field}: expected"):
        GenerationOptions(**{field: value})


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_a_seed_that_is_none_is_refused(planner, seed):
    with pytest.raises(InvalidObservationError, match="seed: expected an integer"):
        planner.prepare(libero_observation(), prompt="go", seed=seed)


def test_a_planner_of_one_robot_says_what_it_wants(planner):
    libero = load_planner_config("pi05_libero")
    specs = Planner(dataclasses.replace(libero, model=GOLDEN.config), planner.decoder, TOKENIZER).image_specs
    assert [(spec.path, spec.height, spec.required) for spec in specs] == [
        ("observation/image", 56, True),
        ("observation/wrist_image", 56, True),
    ]
    assert len(planner.image_specs) == 7
    assert not any(spec.required for spec in planner.image_specs)
    assert planner.view_counts == [1, 2, 3]
    with pytest.raises(PolicyConfigError, match="max_batch_size: expected at least 1, got 0"):
        Planner(CONFIG, planner.decoder, TOKENIZER, max_batch_size=0)


def test_after_warm_up_nothing_compiles(golden_decoder):
    planner = Planner(dataclasses.replace(CONFIG, robots=CONFIG.robots[2:]), golden_decoder, TOKENIZER)
    assert planner.warm_up_shapes() == [WarmUpShape(1, 2, bucket) for bucket in (32, 64, 128, 200)]
    seen = []
    planner.warm_up(planner.warm_up_shapes()[:2], lambda *progress: seen.append(progress))
    assert seen == [(0, 2, WarmUpShape(1, 2, 32)), (1, 2, WarmUpShape(1, 2, 64))]
    compiled = golden_decoder._start._cache_size(), golden_decoder._advance._cache_size()
    for prompt in ("go", "open the drawer and the other drawer, then fold the towel and wipe the table"):
        for options in (LONG, GenerationOptions(temperature=1, top_k=5)):
            prepared = planner.prepare(libero_observation(), prompt=prompt, options=options)
            planner.run([prepared])
            list(planner.stream(prepared))
    assert (golden_decoder._start._cache_size(), golden_decoder._advance._cache_size()) == compiled
