"""Tests of the safetensors reader: openpi's and LeRobot's naming, memory, and files that are damaged."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from openpi_flash_models.checkpoints.layout import TORCH_EMBEDDING, torch_shapes, validate
from openpi_flash_models.checkpoints.safetensors_source import open_torch_source
from openpi_flash_models.config import GemmaConfig, ModelConfig, ModelType, VisionConfig
from openpi_flash_models.errors import CheckpointError

GOLDEN = Path(__file__).parents[3] / "tests/data/golden"
TIED = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
EXPERT = "paligemma_with_expert.gemma_expert."


def config_of(model):
    """The ModelConfig of a folder of golden data."""
    data = json.loads((GOLDEN / model / "config.json").read_text())
    return ModelConfig(
        model_type=ModelType.PI05 if data["pi05"] else ModelType.PI0,
        vision=VisionConfig(**data["vision"], image_size=data["image_size"], patch_size=data["patch_size"]),
        vlm=GemmaConfig(**data["paligemma"]),
        expert=GemmaConfig(**data["action_expert"]),
        vocab_size=data["vocab_size"],
        action_dim=data["action_dim"],
        action_horizon=data["action_horizon"],
        max_token_len=data["max_token_len"],
    )


def save(path, tensors):
    save_file(tensors, path)
    return path


def assert_same(source, expected):
    assert set(source.names()) == set(expected)
    for name, array in expected.items():
        assert source.shape(name) == array.shape
        assert source.dtype(name) == array.dtype
        np.testing.assert_array_equal(source.read(name), array)


@pytest.fixture
def pi0():
    return load_file(GOLDEN / "pi0_a/model.safetensors")


@pytest.fixture
def pi05():
    return load_file(GOLDEN / "pi05_a/model.safetensors")


def without_junk(tensors):
    return {name: array for name, array in tensors.items() if name != EXPERT + "lm_head.weight"}


@pytest.mark.parametrize("model", ["pi0_a", "pi05_a", "pi05_e2e"])
def test_openpi_s_file_holds_exactly_what_the_model_needs(model, caplog):
    source = open_torch_source(GOLDEN / model)
    validate(source, torch_shapes(config_of(model)))
    assert not caplog.records
    expected = without_junk(load_file(GOLDEN / model / "model.safetensors"))
    assert_same(source, expected)
    assert_same(open_torch_source(GOLDEN / model / "model.safetensors"), expected)
    if model == "pi05_e2e":
        assert source.dtype(TORCH_EMBEDDING) == ml_dtypes.bfloat16


def test_names_run_from_the_largest_tensor_to_the_smallest():
    source = open_torch_source(GOLDEN / "pi0_a")
    sizes = [source.read(name).nbytes for name in source.names()]
    assert sizes == sorted(sizes, reverse=True)


def test_a_policy_saved_by_lerobot_is_read_through_its_prefix(tmp_path, pi05):
    saved = {f"model.{name}": array for name, array in pi05.items()}
    saved["model." + TIED] = saved["model." + TORCH_EMBEDDING].copy()  # LeRobot stores the tied pair twice
    assert_same(open_torch_source(save(tmp_path / "model.safetensors", saved)), without_junk(pi05))


def test_the_embedding_is_found_under_either_name(tmp_path, pi0):
    renamed = {TIED if name == TORCH_EMBEDDING else name: array for name, array in pi0.items()}
    assert_same(open_torch_source(save(tmp_path / "m.safetensors", renamed)), without_junk(pi0))


def test_the_time_mlp_is_named_after_the_model_type_it_sits_in(tmp_path, pi0, pi05):
    lerobot_pi0 = {name.replace("action_time_mlp", "time_mlp"): array for name, array in pi0.items()}
    assert_same(open_torch_source(save(tmp_path / "pi0.safetensors", lerobot_pi0)), without_junk(pi0))
    old_pi05 = {name.replace("time_mlp", "action_time_mlp"): array for name, array in pi05.items()}
    assert_same(open_torch_source(save(tmp_path / "pi05.safetensors", old_pi05)), without_junk(pi05))


def test_what_lerobot_drops_from_pi05_files_is_left_out(tmp_path, pi05):
    extra = {
        "state_proj.weight": np.zeros((24, 32), np.float32),
        "state_proj.bias": np.zeros(24, np.float32),
        EXPERT + "model.norm.weight": np.zeros(24, np.float32),
        EXPERT + "model.layers.1.input_layernorm.weight": np.zeros(24, np.float32),
    }
    assert_same(open_torch_source(save(tmp_path / "m.safetensors", pi05 | extra)), without_junk(pi05))


def test_shards_are_read_through_their_index(tmp_path, pi0):
    names = sorted(pi0)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, half in halves.items():
        save(tmp_path / file, {name: pi0[name] for name in half})
    weight_map = {name: file for file, half in halves.items() for name in half}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(open_torch_source(tmp_path), without_junk(pi0))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: cannot be read"):
        open_torch_source(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="not the name of a file beside it"):
        open_torch_source(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="not an index"):
        open_torch_source(tmp_path)


def with_header(path, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


BAD_HEADERS = {
    "not JSON": (b"{nonsense", "not JSON"),
    "too deep": (b"[" * 100_000, "not JSON"),
    "a list": (b"[]", "not a JSON object"),
    "an entry that is a number": ({"x": 3}, "malformed"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, "malformed"),
    "one offset": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "malformed"),
    "an unknown type": ({"x": {"dtype": "F4", "shape": [1], "data_offsets": [0, 8]}}, "element type F4"),
    "an unhashable dtype": ({"x": {"dtype": [], "shape": [1], "data_offsets": [0, 8]}}, r"element type \[\]"),
    "a negative size": ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, "non-negative"),
    "a size that is text": ({"x": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, "non-negative"),
    "too few bytes": ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "do not hold"),
    "past the end": ({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, "truncated"),
    "absurdly large": ({"x": {"dtype": "F32", "shape": [1 << 70], "data_offsets": [0, 1 << 72]}}, "truncated"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_a_typed_error(tmp_path, case):
    header, message = BAD_HEADERS[case]
    with pytest.raises(CheckpointError, match=message):
        open_torch_source(with_header(tmp_path / "bad.safetensors", header, bytes(8)))


def test_a_huge_header_length_is_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(CheckpointError, match="not a safetensors file, or truncated"):
        open_torch_source(path)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1, -100_000])
def test_a_truncated_file_is_a_typed_error(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    path.write_bytes((GOLDEN / "pi0_a/model.safetensors").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=str(path)):
        open_torch_source(tmp_path)


def test_a_missing_file_and_a_missing_tensor_are_typed_errors(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        open_torch_source(tmp_path)
    source = open_torch_source(GOLDEN / "pi0_a")
    with pytest.raises(CheckpointError, match="no tensor nonsense"):
        source.read("nonsense")


def test_closing_leaves_arrays_that_are_still_held_readable(tmp_path):
    shutil.copy(GOLDEN / "pi0_a/model.safetensors", tmp_path)
    source = open_torch_source(tmp_path)
    array = source.read("action_in_proj.bias")
    before = array.copy()
    source.close()
    np.testing.assert_array_equal(array, before)


RSS_PROBE = """
import sys
from pathlib import Path
from openpi_flash_models.checkpoints.safetensors_source import open_torch_source

def rss():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) >> 10

source = open_torch_source(Path(sys.argv[1]))
before = rss()
for name in source.names():
    source.read(name).sum()
    held = rss()
    source.release(name)
    print(held - before, rss() - before)
"""


def test_releasing_a_tensor_gives_its_memory_back(tmp_path):
    tensors = {f"tensor{i}": np.ones((16 << 20) // 4, np.float32) for i in range(3)}
    path = save(tmp_path / "m.safetensors", tensors)
    run = subprocess.run([sys.executable, "-c", RSS_PROBE, path], capture_output=True, text=True, check=True)
    for line in run.stdout.splitlines():
        held_mib, released_mib = map(int, line.split())
        assert held_mib >= 15
        assert released_mib <= 4
