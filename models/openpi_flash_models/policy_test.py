"""The policy around a model that is plain arithmetic: what reaches the model, what comes back, and every refusal."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from openpi_flash_models.batching import WarmUpShape
from openpi_flash_models.config import ModelConfig
from openpi_flash_models.errors import CheckpointError, InvalidObservationError, ModelsError, PolicyConfigError
from openpi_flash_models.images import ImageLayout
from openpi_flash_models.normalize import NormStats
from openpi_flash_models.observation import ImageSpec, flatten
from openpi_flash_models.policy import Policy, TensorSpec
from openpi_flash_models.policy_configs import load_policy_config
from openpi_flash_models.realtime import Method, soft_mask
from openpi_flash_models.request import ModelBatch
from openpi_flash_models.tokenizer import PromptTokenizer

TOKENIZER = PromptTokenizer(Path(__file__).parents[2] / "tests/data/golden/tokenizer/tiny_visible.model")


class LinearBackend:
    """Actions are half the noise plus the number of flow steps; keeps every batch that it was given."""

    name = "linear"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.batches: list[ModelBatch] = []

    def sample_actions(self, batch: ModelBatch) -> np.ndarray:
        self.batches.append(batch)
        return batch.noise / 2 + np.float32(batch.num_steps)


def stats(dim: int) -> NormStats:
    rng = np.random.default_rng(dim)
    q01 = rng.uniform(-2, -1, dim)
    return NormStats(mean=rng.standard_normal(dim), std=rng.uniform(0.5, 2, dim), q01=q01, q99=q01 + 3)


def make_policy(name: str, **options) -> tuple[Policy, LinearBackend]:
    config = load_policy_config(name)
    backend = LinearBackend(config.model)
    dims = {"state": stats(config.robot.state_dim), "actions": stats(config.robot.action_dim)}
    return Policy(config, backend, TOKENIZER, dims, **options), backend


def aloha_observation() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    cameras = ("images/cam_high", "images/cam_right_wrist")
    pictures = {path: rng.integers(0, 256, (3, 224, 224), np.uint8) for path in cameras}
    return {**pictures, "state": rng.uniform(-1, 1, 14)}


def droid_observation() -> dict[str, np.ndarray]:
    return {
        "observation/exterior_image_1_left": np.full((180, 320, 3), 90, np.uint8),
        "observation/wrist_image_left": np.full((224, 224, 3), 0.5, np.float32),
        "observation/joint_position": np.linspace(-1, 1, 7),
        "observation/gripper_position": np.array([0.5]),
    }


def test_only_valid_cameras_and_tokens_reach_the_model():
    policy, _ = make_policy("pi05_aloha")
    observation = aloha_observation()
    request = policy.prepare(observation, prompt="fold the towel").request
    assert request.images.shape == (2, 224, 224, 3)
    np.testing.assert_array_equal(request.images[0], observation["images/cam_high"].transpose(1, 2, 0))
    assert TOKENIZER.decode(request.tokens).startswith("Task: fold the towel, State: ")
    assert request.shape_key == (2, "uint8", 128, 10, None)
    assert request.state.shape == (32,)
    assert not request.state[14:].any()


def test_pictures_of_other_sizes_are_resized_side_by_side():
    policy, _ = make_policy("pi05_droid")
    images = policy.prepare(droid_observation(), prompt="go").request.images
    assert images.shape == (2, 224, 224, 3)
    assert images[0, 0].max() == 0
    assert images[0, 112].min() == 90
    assert images[1].min() == images[1].max() == 127


def test_the_prompt_carries_the_normalised_state_where_the_model_reads_it_there():
    observation = {
        "observation/image": np.zeros((224, 224, 3), np.uint8),
        "observation/wrist_image": np.zeros((224, 224, 3), np.uint8),
        "observation/state": np.zeros(8),
    }
    for name in ("pi05_libero", "pi0_libero"):
        tokens = make_policy(name)[0].prepare(observation, prompt="go").request.tokens
        assert TOKENIZER.decode(tokens) == "go\n"


def test_relative_actions_are_relative_to_the_state_as_trained():
    policy, _ = make_policy("pi05_aloha")
    state = np.linspace(-0.5, 0.5, 14)
    prepared = policy.prepare({**aloha_observation(), "state": state}, prompt="go")
    # Normalised actions of -1 are q01; then signs and grippers are the robot's again.
    model_actions = np.full((50, 32), -1, np.float32)
    actions = policy.finish(prepared, model_actions)["actions"]
    assert actions.shape == (50, 14)
    assert actions.dtype == np.float64
    q01 = stats(14).q01
    np.testing.assert_allclose(actions[3, 0], q01[0] + state[0])
    np.testing.assert_allclose(actions[3, 1], -(q01[1] - state[1]))
    np.testing.assert_allclose(actions[3, 6], (q01[6] + 0.5476 + 0.6213) / (1.4910 + 0.6213))


def test_infer_takes_openpis_nested_observation():
    policy, _ = make_policy("pi05_aloha")
    flat = aloha_observation()
    pictures = {path.removeprefix("images/"): value for path, value in flat.items() if path != "state"}
    nested = {"images": pictures, "state": flat["state"], "prompt": "fold"}
    from_nested = policy.infer(nested, seed=3)["actions"]
    np.testing.assert_array_equal(from_nested, policy.infer(flat, prompt="fold", seed=3)["actions"])


def test_flatten_joins_names_by_slashes():
    assert flatten({"a": {"b": 1, "c/d": 2}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}


def test_a_seed_or_noise_makes_actions_repeatable():
    policy, _ = make_policy("pi05_droid")
    prepared = [policy.prepare(droid_observation(), prompt="go", seed=7).request for _ in range(2)]
    np.testing.assert_array_equal(prepared[0].noise, prepared[1].noise)
    assert prepared[0].deterministic
    given = policy.prepare(droid_observation(), prompt="go", noise=prepared[0].noise.astype(np.float64)).request
    np.testing.assert_array_equal(given.noise, prepared[0].noise)
    assert given.deterministic

    fresh = [policy.prepare(droid_observation(), prompt="go").request for _ in range(2)]
    assert not fresh[0].deterministic
    assert (fresh[0].noise != fresh[1].noise).any()
    assert fresh[0].noise.dtype == np.float32


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"prompt": None}, "prompt", "required prompt is missing"),
        ({"prompt": 3}, "prompt", "expected a string, got int"),
        ({"prompt": ["go"]}, "prompt", "expected a string, got list"),
        ({"prompt": np.zeros(1)}, "prompt", "expected a string, got array of float64"),
        ({"prompt": b"\xff\xfe"}, "prompt", "expected text in UTF-8"),
        ({"prompt": "lone \ud800"}, "prompt", "expected text in UTF-8"),
        ({"prompt": "go " * 5000}, "prompt", "at most 10000 characters, got 15000"),
        ({"seed": 1, "noise": np.zeros((15, 32))}, "noise", "seed and noise exclude each other"),
        ({"seed": -1}, "seed", "expected an integer from 0"),
        ({"seed": 2**64}, "seed", "expected an integer from 0"),
        ({"seed": 1.5}, "seed", "expected an integer from 0 .*, got 1.5"),
        ({"seed": True}, "seed", "got True"),
        ({"noise": np.zeros((15, 31))}, "noise", r"expected shape \(15, 32\), got \(15, 31\)"),
        ({"noise": np.full((15, 32), np.nan)}, "noise", "expected finite float32"),
        ({"noise": np.full((15, 32), 1e300)}, "noise", "expected finite float32"),
        ({"noise": np.zeros((15, 32), np.int64)}, "noise", "expected floats, got int64"),
        ({"num_steps": 0}, "num_steps", "from 1 to 100, got 0"),
        ({"num_steps": 101}, "num_steps", "from 1 to 100, got 101"),
        ({"num_steps": "10"}, "num_steps", "from 1 to 100, got '10'"),
    ],
)
def test_options_out_of_range_are_named(options, field, message):
    policy, _ = make_policy("pi05_droid")
    with pytest.raises(InvalidObservationError, match=message) as caught:
        policy.prepare(droid_observation(), **{"prompt": "go", **options})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("observation/wrist_image_left", np.zeros((1, 500, 3), np.uint8), "too thin"),
        ("observation/joint_position", np.full(7, 1e300), "too large"),
    ],
)
def test_what_only_shows_further_on_is_named_as_well(path, value, message):
    policy, _ = make_policy("pi05_droid")
    with pytest.raises(InvalidObservationError, match=message) as caught:
        policy.prepare({**droid_observation(), path: value}, prompt="go")
    assert caught.value.field == path


@pytest.mark.parametrize("prompt", ["go", b"go", np.array("go"), np.array([b"go"]), np.str_("go")])
def test_prompts_may_be_text_of_any_kind(prompt):
    policy, _ = make_policy("pi0_droid")
    assert TOKENIZER.decode(policy.prepare(droid_observation(), prompt=prompt).request.tokens) == "go\n"


def test_the_callers_default_prompt_goes_before_the_configurations():
    observation = aloha_observation()
    for default, expected in ((None, "fold the towel\n"), ("wave", "wave\n")):
        policy, _ = make_policy("pi0_aloha_towel", default_prompt=default)
        assert TOKENIZER.decode(policy.prepare(observation).request.tokens) == expected
        assert TOKENIZER.decode(policy.prepare(observation, prompt="").request.tokens) == "\n"


def test_a_batch_is_padded_to_the_next_size():
    policy, backend = make_policy("pi05_droid", max_batch_size=6)
    assert policy.batch_sizes == (1, 2, 4, 6)
    prepared = [policy.prepare(droid_observation(), prompt="go") for _ in range(3)]
    actions = policy.run(prepared)
    assert backend.batches[0].images.shape[0] == 4
    assert len(actions) == 3
    for item, action in zip(prepared, actions, strict=True):
        np.testing.assert_array_equal(action, item.request.noise / 2 + 10)


def test_batches_that_may_not_be_are_refused():
    policy, _ = make_policy("pi05_droid", max_batch_size=2)
    plain, seeded = (policy.prepare(droid_observation(), prompt="go", seed=seed) for seed in (None, 1))
    other = policy.prepare(droid_observation(), prompt="go", num_steps=3)
    for batch, message in (
        ([], "one shape key"),
        ([plain, other], "one shape key"),
        ([plain, seeded], "runs alone"),
        ([plain] * 3, "at most 2"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.run(batch)


def test_actions_that_are_not_finite_never_reach_a_robot():
    policy, _ = make_policy("pi05_droid")
    prepared = policy.prepare(droid_observation(), prompt="go")
    model_actions = np.zeros((15, 32), np.float32)
    model_actions[4, 20] = np.nan  # beyond the robot's dimensions: harmless
    assert policy.finish(prepared, model_actions)["actions"].shape == (15, 8)
    model_actions[4, 2] = np.nan
    with pytest.raises(ModelsError, match="not finite"):
        policy.finish(prepared, model_actions)


def test_warm_up_runs_every_shape_that_can_occur():
    policy, backend = make_policy("pi05_aloha", max_batch_size=2, num_steps=4)
    seen: list[tuple[int, int, WarmUpShape]] = []
    policy.warm_up(progress=lambda done, total, shape: seen.append((done, total, shape)))
    # 14 numbers of the state make the shortest prompt longer than the smallest bucket.
    assert policy.prompt_buckets == (64, 128, 200)
    shapes = [(len(b.images), b.images.shape[1], b.tokens.shape[1]) for b in backend.batches]
    assert shapes == [(b, v, n) for b in (1, 2) for v in (3, 2, 1) for n in (64, 128, 200)]
    assert [shape[:3] for _, _, shape in seen] == shapes
    assert [done for done, _, _ in seen] == list(range(18))
    assert {batch.num_steps for batch in backend.batches} == {4}
    assert all(batch.token_mask.all() for batch in backend.batches)

    request = policy.prepare(aloha_observation(), prompt="go").request
    assert (1, request.shape_key.num_views, request.shape_key.prompt_bucket) in shapes


def test_specs_say_what_to_send():
    policy, _ = make_policy("pi05_aloha")
    assert policy.image_specs == (
        ImageSpec("images/cam_high", 224, 224, ImageLayout.CHW, required=True),
        ImageSpec("images/cam_left_wrist", 224, 224, ImageLayout.CHW, required=False),
        ImageSpec("images/cam_right_wrist", 224, 224, ImageLayout.CHW, required=False),
    )
    assert policy.tensor_specs == (TensorSpec("state", (14,), "float64", required=True),)
    assert policy.robot_action_dim == 14
    assert policy.metadata["reset_pose"]
    droid, _ = make_policy("pi05_droid")
    assert [spec.layout for spec in droid.image_specs] == [ImageLayout.HWC] * 2
    assert list(droid.view_counts) == [2]


def test_statistics_that_do_not_fit_are_refused_when_loading():
    config = load_policy_config("pi05_droid")
    for given, message in (
        (None, "`state` are missing"),
        ({"state": stats(8)}, "`actions` are missing"),
        ({"state": stats(7), "actions": stats(8)}, "`state` have 7 numbers; pi05_droid needs 8 to 32"),
        ({"state": stats(32), "actions": stats(33)}, "`actions` have 33 numbers"),
        ({"state": stats(8), "actions": NormStats(np.zeros(8), np.ones(8))}, "`actions`: .* needs q01 and q99"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Policy(config, LinearBackend(config.model), TOKENIZER, given)


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"num_steps": 101}, {"max_batch_size": 0}])
def test_options_of_the_policy_out_of_range_are_named(options):
    with pytest.raises(PolicyConfigError, match=next(iter(options))):
        make_policy("pi05_droid", **options)


def test_a_vocabulary_larger_than_the_models_is_refused():
    config = load_policy_config("debug")
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=100))
    with pytest.raises(CheckpointError, match="has 512 pieces, the model's vocabulary 100"):
        Policy(small, LinearBackend(small.model), TOKENIZER, None)


@pytest.mark.parametrize("name", ["pi05_aloha", "pi0_aloha", "pi05_full_droid_finetune", "pi05_libero"])
def test_a_previous_chunk_is_brought_back_to_what_the_model_gave(name):
    policy, _ = make_policy(name, real_time_chunking=True)
    robot = policy.config.robot
    if robot.name == "libero":
        pictures = {entry.path: np.zeros((224, 224, 3), np.uint8) for entry in robot.cameras}
        observation = {**pictures, "observation/state": np.linspace(-1, 1, 8)}
    else:
        observation = aloha_observation() if robot.name == "aloha" else droid_observation()
    begun = policy.prepare(observation, prompt="go", seed=1)
    (given,) = policy.run([begun])
    chunk = policy.finish(begun, given)["actions"]
    options = {"previous_actions": chunk, "inference_delay": 2, "execution_horizon": 4}
    request = policy.prepare(observation, prompt="go", **options).request
    horizon, width = policy.config.model.action_horizon, policy.robot_action_dim
    np.testing.assert_allclose(request.continuation.actions[: horizon - 4, :width], given[4:, :width], atol=1e-5)
    assert not request.continuation.actions[horizon - 4 :].any()
    assert not request.continuation.actions[:, width:].any()
    np.testing.assert_array_equal(request.continuation.weights, soft_mask(horizon, 2, 4))
    assert request.shape_key.continues is Method.GUIDED


def test_relative_actions_are_relative_to_the_state_of_now():
    policy, _ = make_policy("pi05_full_droid_finetune", real_time_chunking=True)
    chunk = np.zeros((16, 8))
    options = {"prompt": "go", "previous_actions": chunk, "inference_delay": 0, "execution_horizon": 1}
    observation = droid_observation()
    before = policy.prepare(observation, **options).request.continuation.actions
    observation["observation/joint_position"] = observation["observation/joint_position"] + 1
    after = policy.prepare(observation, **options).request.continuation.actions
    # One unit further on, a place is one unit less away; the statistics scale it. The gripper is absolute.
    np.testing.assert_allclose((after - before)[:15, :7], np.broadcast_to([-2 / (3 + 1e-6)] * 7, (15, 7)), atol=1e-5)
    np.testing.assert_array_equal(after[:, 7], before[:, 7])


def test_requests_that_continue_a_chunk_share_calls_among_themselves():
    policy, backend = make_policy("pi05_droid", real_time_chunking=True, max_batch_size=2)
    options = {"prompt": "go", "previous_actions": np.zeros((15, 8)), "execution_horizon": 5}
    first, second = (policy.prepare(droid_observation(), inference_delay=delay, **options) for delay in (1, 3))
    policy.run([first, second])
    assert backend.batches[0].continues is Method.GUIDED
    assert backend.batches[0].continuation.actions.shape == (2, 15, 32)
    np.testing.assert_array_equal(backend.batches[0].continuation.weights, [soft_mask(15, 1, 5), soft_mask(15, 3, 5)])
    plain = policy.prepare(droid_observation(), prompt="go")
    with pytest.raises(ValueError, match="one shape key"):
        policy.run([first, plain])
    assert policy.prepare(droid_observation(), inference_delay=1, seed=3, **options).deterministic


def test_without_a_previous_chunk_the_model_is_given_what_it_always_was():
    batches = []
    for switched_on in (False, True):
        policy, backend = make_policy("pi05_droid", real_time_chunking=switched_on)
        policy.infer(droid_observation(), prompt="go", seed=4)
        batches += backend.batches
    for field in dataclasses.fields(ModelBatch):
        off, on = (getattr(batch, field.name) for batch in batches)
        np.testing.assert_array_equal(off, on)
    assert batches[0].continues is batches[1].continuation is None


def test_a_policy_that_continues_chunks_is_warm_for_them():
    policy, backend = make_policy("pi05_droid", real_time_chunking=True)
    policy.warm_up()
    kinds = [batch.continues for batch in backend.batches]
    assert kinds == [None] * (len(kinds) // 2) + [Method.GUIDED] * (len(kinds) // 2)
    assert all(batch.continuation.weights.shape == (1, 15) for batch in backend.batches[len(kinds) // 2 :])


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"previous_actions": np.zeros((15, 7))}, "previous_actions", r"expected shape \(15, 8\), got \(15, 7\)"),
        ({"previous_actions": np.zeros((15, 8), bool)}, "previous_actions", "expected real numbers, got bool"),
        ({"previous_actions": np.full((15, 8), np.nan)}, "previous_actions", r"element \(0, 0\) is nan"),
        ({"previous_actions": np.full((15, 8), 1e300)}, "previous_actions", "infinite once normalised"),
        ({"previous_actions": None}, "inference_delay", "without previous_actions"),
        ({"previous_actions": None, "inference_delay": None}, "execution_horizon", "without previous_actions"),
        ({"inference_delay": None}, "inference_delay", "from 0 to 5 .*, got None"),
        ({"inference_delay": 6}, "inference_delay", r"from 0 to 5 \(of 15 steps 5 were carried out\), got 6"),
        ({"inference_delay": 6, "execution_horizon": 10}, "inference_delay", "from 0 to 5 "),
        ({"inference_delay": -1}, "inference_delay", "got -1"),
        ({"inference_delay": 1.5}, "inference_delay", "got 1.5"),
        ({"execution_horizon": 0}, "execution_horizon", "from 1 to 15 .*, got 0"),
        ({"execution_horizon": 16}, "execution_horizon", "got 16"),
        ({"execution_horizon": None}, "execution_horizon", "got None"),
    ],
)
def test_a_chunk_that_cannot_be_continued_is_refused_by_name(changes, field, message):
    policy, _ = make_policy("pi05_droid", real_time_chunking=True)
    options = {"previous_actions": np.zeros((15, 8)), "inference_delay": 2, "execution_horizon": 5, **changes}
    with pytest.raises(InvalidObservationError, match=message) as caught:
        policy.prepare(droid_observation(), prompt="go", **options)
    assert caught.value.field == field


def test_a_policy_without_real_time_chunking_says_so():
    policy, _ = make_policy("pi05_droid")
    options = {"previous_actions": np.zeros((15, 8)), "inference_delay": 2, "execution_horizon": 5}
    with pytest.raises(InvalidObservationError, match="not switched on") as caught:
        policy.prepare(droid_observation(), prompt="go", **options)
    assert caught.value.field == "previous_actions"
