"""Normalisation statistics and their errors. Equality with openpi's numbers: golden/transforms_test.py."""

import json

import numpy as np
import pytest

from openpi_flash_models.errors import CheckpointError
from openpi_flash_models.normalize import Normalization, Normalizer, NormStats, load_norm_stats

STATS = NormStats(
    mean=np.array([1.0, 2.0]), std=np.array([2.0, 0.0]), q01=np.array([-1.0, 3.0]), q99=np.array([3.0, 3.0])
)


@pytest.mark.parametrize("kind", [Normalization.QUANTILE, Normalization.ZSCORE])
def test_there_and_back(kind):
    normalizer = Normalizer.from_stats(STATS, kind)
    x = np.array([0.3, 3.0])
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize(x)), x, rtol=1e-12)


def test_quantiles_map_to_minus_one_and_one():
    normalizer = Normalizer.from_stats(STATS, Normalization.QUANTILE)
    np.testing.assert_allclose(normalizer.normalize(np.array([-1.0])), [-1])
    np.testing.assert_allclose(normalizer.normalize(np.array([3.0])), [1], atol=1e-6)
    np.testing.assert_allclose(normalizer.normalize(np.array([7.0])), [3], atol=2e-6)  # not clipped


def test_dimensions_beyond_the_statistics_pass_through():
    x = np.array([[0.5, 0.5, 0.25]], np.float32)
    assert Normalizer.from_stats(STATS, Normalization.QUANTILE).unnormalize(x)[0, 2] == 0.25
    assert Normalizer.from_stats(STATS, Normalization.ZSCORE).unnormalize(x)[0, 2] == 0.25 * (1 + 1e-6)


def test_identity_only_widens():
    x = np.array([0.5], np.float32)
    normalizer = Normalizer.identity()
    for y in (normalizer.normalize(x), normalizer.unnormalize(x)):
        assert y.dtype == np.float64
        assert y == x


def test_quantile_normalisation_needs_quantiles():
    with pytest.raises(ValueError, match="q01 and q99"):
        Normalizer.from_stats(NormStats(mean=np.zeros(1), std=np.ones(1)), Normalization.QUANTILE)


def test_null_quantiles_are_read_as_absent(tmp_path):
    path = tmp_path / "norm_stats.json"
    entry = {"mean": [0], "std": [1], "q01": None, "q99": None}
    path.write_text(json.dumps({"norm_stats": {"state": entry}}))
    stats = load_norm_stats(path)["state"]
    assert stats.q01 is None
    assert stats.std.dtype == np.float64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected an object with an object `norm_stats`"),
        ("[]", "expected an object with an object `norm_stats`"),
        ("{}", "expected an object with an object `norm_stats`"),
        ('{"norm_stats": {"state": 3}}', "expected an object"),
        ('{"norm_stats": {"state": {"mean": [0]}}}', r"state\.std is missing"),
        ('{"norm_stats": {"state": {"mean": ["a"], "std": [1]}}}', r"state\.mean: expected a list of numbers"),
        ('{"norm_stats": {"state": {"mean": [[0]], "std": [1]}}}', r"state\.mean: expected a flat list"),
        ('{"norm_stats": {"state": {"mean": [NaN], "std": [1]}}}', r"state\.mean: expected a flat list of finite"),
        ('{"norm_stats": {"state": {"mean": [0, 0], "std": [1]}}}', "one length expected, got mean 2, std 1"),
    ],
)
def test_malformed_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "norm_stats.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_norm_stats(path)
    assert str(path) in str(caught.value)
