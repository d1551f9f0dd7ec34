"""The benchmark of the model: a tiny model once, for real; what is made of an arm's figures; and the picture."""

import json
import logging
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from openpi_flash_models.checkpoints.layout import torch_shapes
from openpi_flash_models.cost import action_costs
from PIL import Image

from openpi_flash_cli import bench, bench_arm, bench_plot
from openpi_flash_cli.bench_arm import RandomSource, summary

TIMES = {"p50_ms": 2.0, "p95_ms": 3.0, "p99_ms": 4.0}


def arm(**others):
    rates = {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e9, "device_name": "a machine"}
    return {**rates, "peak_bytes": 1, "load_s": 1.0, "first_calls_s": 1.0, **others}


def test_a_tiny_model_is_timed_compared_and_profiled(tmp_path):
    report, picture = tmp_path / "report.json", tmp_path / "plot.png"
    options = [
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--arms",
        "torch",
        "torch-guided",
        "--batches",
        "1",
        "2",
        "--runs",
        "2",
        "--together",
        "2",
        "--profile",
    ]
    command = [sys.executable, "-m", "openpi_flash_cli.bench", "model", *options, "--json", report, "--plot", picture]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    arms = json.loads(report.read_text())["arms"]
    assert list(arms) == ["torch-float32", "torch", "torch-guided"]
    assert arms["torch-float32"]["max_difference"] == 0
    assert arms["torch"]["cosine"] >= bench.MIN_COSINE
    assert arms["torch"]["max_difference"] > 0
    assert set(arms["torch"]["batches"]) == {"1", "2"}
    assert "cosine" not in arms["torch-guided"]  # the float32 model's chunks continue no others
    for times in (*arms["torch"]["batches"].values(), *arms["torch-guided"]["batches"].values()):
        assert 0 < times["limit_ms"] < times["p50_ms"] <= times["p99_ms"]
    assert arms["torch"]["profile"]["count"] > 100
    kernels = arms["torch"]["profile"]["longest"]
    assert sum(each["count"] for each in kernels) == arms["torch"]["profile"]["count"]
    assert Image.open(picture).width == bench_plot.WIDTH
    assert "torch, one call of a batch of 1" in done.stdout
    assert arms["torch"]["warnings"] == []


def test_each_backend_gets_its_float32_model_once_and_first():
    assert bench.with_references(["torch", "jax", "torch-fp8", "planner"]) == [
        *("torch-float32", "jax-float32"),
        *("torch", "jax", "torch-fp8", "planner"),
    ]
    assert bench.with_references(["torch-float32"]) == ["torch-float32"]
    assert bench.with_references(["torch-guided"]) == ["torch-guided"]


def test_an_arm_that_fails_is_reported_and_the_exit_code_says_so(tmp_path, monkeypatch, capsys):
    def measure(names, job, directory, *, together):
        return ((name, {"error": f"{name} has no such GPU"}) for name in names)

    monkeypatch.setattr(bench, "measure", measure)
    arguments = bench.argparse.ArgumentParser()
    bench.add_arguments(arguments)
    assert bench.run(arguments.parse_args(["model", "--device", "cpu", "--arms", "torch"])) == 1
    assert "torch-float32 has no such GPU" in capsys.readouterr().out


def test_limits_and_exactness_are_worked_out(tmp_path):
    np.save(tmp_path / "torch-float32.npy", np.array([3.0, 4.0], np.float32))
    np.save(tmp_path / "torch.npy", np.array([3.0, 4.5], np.float32))
    result = bench.evaluate("torch", arm(batches={"2": dict(TIMES)}), "tiny", tmp_path)
    costs = action_costs(bench.SIZES["tiny"], batch=2, num_views=3, prompt=64, num_steps=10).values()
    limit_ms = sum(max(cost.flops, cost.num_bytes) for cost in costs) / 1e9 * 1e3
    assert result["batches"]["2"]["limit_ms"] == pytest.approx(limit_ms)
    assert result["batches"]["2"]["share_of_limit"] == pytest.approx(limit_ms / 2.0)
    assert result["batches"]["2"]["requests_per_s"] == pytest.approx(1000)
    assert result["max_difference"] == 0.5
    assert result["cosine"] == pytest.approx(27 / (5 * np.hypot(3, 4.5)))
    assert not result["accurate"]


def test_what_makes_a_model_slower_than_it_could_be_is_collected():
    warnings = bench_arm.collected_warnings()
    logging.getLogger("openpi_flash_models.torch.selection").warning("fused kernel %s is off", "geglu")
    logging.getLogger("openpi_flash_models.torch.selection").info("nothing to worry about")
    assert warnings == ["fused kernel geglu is off"]


def test_a_picture_has_a_row_for_each_figure(tmp_path):
    further = {"first_token": {**TIMES, "limit_ms": 1.0}, "further_token": {**TIMES, "limit_ms": 1.0}}
    arms = {
        "torch": arm(batches={"1": {**TIMES, "limit_ms": 1.0}}),
        "planner": arm(**further),
        "jax": {"error": "it failed"},
    }
    bench_plot.draw({"job": {"size": "tiny", "device": "cpu"}, "arms": arms}, tmp_path / "plot.png")
    colours = {colour for _, colour in Image.open(tmp_path / "plot.png").convert("RGB").getcolors(1 << 16)}
    assert {(0x3B, 0x6F, 0xB6), (0xD9, 0x82, 0x2B), (255, 0, 0)} <= colours


def test_random_weights_are_scaled_and_no_two_rows_of_them_are_alike():
    source = RandomSource(torch_shapes(bench.SIZES["small"]))
    name = "paligemma_with_expert.paligemma.lm_head.weight"
    table = source.read(name)
    assert table.shape == source.shape(name) == (32_000, 256)
    assert table.dtype == source.dtype(name) == ml_dtypes.bfloat16
    wide = table.astype(np.float32)
    assert wide.std() == pytest.approx(256**-0.5, rel=0.01)
    assert len(np.unique(wide[:, :4], axis=0)) > 31_000
    np.testing.assert_array_equal(source.read(name), table)


def test_percentiles_are_in_milliseconds():
    assert summary([0.001] * 50 + [0.002] * 50) == {"p50_ms": 1.5, "p95_ms": 2.0, "p99_ms": 2.0}
