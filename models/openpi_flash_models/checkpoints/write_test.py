"""Tests of the writers: what they write is what others read, and nothing half-written is left under a final name."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from openpi_flash_models.checkpoints import write
from openpi_flash_models.checkpoints.orbax_source import open_jax_source
from openpi_flash_models.errors import CheckpointError

RNG = np.random.default_rng(0)
TENSORS = {
    "stacked/w": RNG.standard_normal((3, 4, 5)).astype(np.float32),
    "half": RNG.standard_normal((7, 3)).astype(np.float16),
    "brain": RNG.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
    "zeros": np.zeros(6, np.float32),
}
LAYOUT = {name: (array.shape, array.dtype) for name, array in TENSORS.items()}


@pytest.fixture(params=[16, 1 << 20])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(write, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block_bytes")
def test_safetensors_files_are_what_the_safetensors_library_reads(tmp_path):
    path = tmp_path / "new/model.safetensors"
    write.write_safetensors(path, LAYOUT, reversed(TENSORS.items()), metadata={"format": "pt"})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.usefixtures("block_bytes")
def test_jax_params_are_read_back(tmp_path):
    write.write_jax_params(tmp_path / "1/params", TENSORS.items())
    source = open_jax_source(tmp_path / "1")
    assert set(source.names()) == set(TENSORS)
    for name, array in TENSORS.items():
        assert source.dtype(name) == array.dtype
        np.testing.assert_array_equal(source.read(name), array)
    assert [entry.name for entry in (tmp_path / "1").iterdir()] == ["params"]


def test_writing_never_replaces_what_is_there(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params/keep").touch()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        write.write_jax_params(tmp_path / "params", TENSORS.items())
    with pytest.raises(CheckpointError, match="exists already"):
        write.write_safetensors(tmp_path / "model.safetensors", LAYOUT, TENSORS.items())


class Failing:
    shape = (2, 2)
    dtype = np.dtype(np.float32)

    def __getitem__(self, rows):
        raise RuntimeError("the source broke")


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="the source broke"):
        write.write_safetensors(tmp_path / "a", {"x": ((2, 2), np.dtype(np.float32))}, [("x", Failing())])
    with pytest.raises(RuntimeError, match="the source broke"):
        write.write_jax_params(tmp_path / "b", [("y", TENSORS["half"]), ("x", Failing())])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (list(TENSORS.items())[:-1], "1 tensors were never given, among them zeros"),
        ([*TENSORS.items(), ("zeros", TENSORS["zeros"])], "zeros: unexpected tensor"),
        ([("zeros", np.zeros(5, np.float32))], r"zeros: unexpected tensor of shape \(5,\)"),
        ([("zeros", np.zeros(6, np.float64))], "zeros: unexpected tensor .* float64"),
        ([("other", np.zeros(6, np.float32))], "other: unexpected tensor"),
    ],
)
def test_tensors_must_be_those_of_the_layout(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        write.write_safetensors(tmp_path / "m", LAYOUT, tensors)
    assert not list(tmp_path.iterdir())
