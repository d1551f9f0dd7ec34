"""What only a GPU can show: kernels as they are compiled, and CUDA graphs. Skipped where there is none."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from openpi_flash_models.checkpoints.check import MIN_COSINE
from openpi_flash_models.checkpoints.safetensors_source import open_torch_source
from openpi_flash_models.checkpoints.synthetic import make_checkpoint
from openpi_flash_models.config import GemmaConfig, ModelConfig, ModelType, VisionConfig
from openpi_flash_models.realtime import Continuation, Method, hard_mask, soft_mask
from openpi_flash_models.request import ModelBatch
from openpi_flash_models.torch import attention_kernels, selection
from openpi_flash_models.torch.backend import load
from openpi_flash_models.torch.fused import FUSED
from openpi_flash_models.torch.graphs import CudaRecorder
from openpi_flash_models.torch.ops import attend_prefix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; benchmarks/gpu.sh runs these on one")

HEADS = {"depth": 2, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256}


def config(model_type):
    return ModelConfig(
        model_type=model_type,
        vision=VisionConfig(width=144, depth=2, mlp_dim=256, num_heads=2, image_size=56),
        vlm=GemmaConfig(width=256, mlp_dim=512, **HEADS),
        expert=GemmaConfig(width=128, mlp_dim=256, **HEADS),
        vocab_size=512,
    )


def batch_of(size, *, num_views=2, length=32, num_steps=10, seed=0):
    rng = np.random.default_rng(seed)
    return ModelBatch(
        images=rng.integers(0, 256, (size, num_views, 56, 56, 3), np.uint8),
        tokens=rng.integers(0, 512, (size, length), np.int32),
        token_mask=np.arange(length) < rng.integers(1, length + 1, (size, 1)),
        state=rng.standard_normal((size, 32), np.float32),
        noise=rng.standard_normal((size, 50, 32), np.float32),
        num_steps=num_steps,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_works_at_full_size(dtype):
    device = torch.device("cuda")
    assert selection.mismatches(FUSED, ModelConfig(), device, dtype) == {}
    assert selection.choose(ModelConfig(), device, dtype) is FUSED


def test_attention_of_the_prefix_works_at_full_size_however_it_is_divided():
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    q, cache = (
        torch.randn(*shape, generator=generator, device=device).bfloat16()
        for shape in ((2, 816, 8, 256), (2, 2, 866, 1, 256))
    )
    lengths = torch.tensor([816, 700], dtype=torch.int32, device=device)
    ways = [FUSED.attend_prefix]
    if torch.cuda.get_device_capability(device) == (9, 0):  # others have one way, FlashAttention
        tiles = attention_kernels.PREFIX_TILES
        ways += [functools.partial(attention_kernels.tiled_attend_prefix, tiles=each) for each in tiles]
    for attend in ways:
        expected = attend_prefix(q, cache, lengths)
        torch.testing.assert_close(attend(q, cache, lengths), expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("options", [{}, {"prefix_precision": "fp8"}], ids=str)
@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("model_type", ModelType)
def test_a_recorded_call_that_continues_chunks_gives_what_an_unrecorded_one_does(
    model_type, method, options, tmp_path, caplog
):
    make_checkpoint(tmp_path / "torch", config(model_type), layout="torch", dtype="float32")
    backend = load(config(model_type), open_torch_source(tmp_path / "torch"), device="cuda", **options)
    rng = np.random.default_rng(0)
    mask = soft_mask(50, 3, 5) if method is Method.GUIDED else hard_mask(50, 3)
    for size in (1, 2):
        for seed in range(3):
            previous = Continuation(rng.standard_normal((size, 50, 32), np.float32), np.stack([mask] * size))
            batch = dataclasses.replace(batch_of(size, seed=seed), continues=method, continuation=previous)
            recorded = backend.sample_actions(batch)
            with torch.inference_mode():
                called = backend._bind(method, backend.upload(batch), batch.num_steps)().cpu().numpy()
            np.testing.assert_allclose(recorded, called, rtol=1e-2, atol=1e-2)
    assert not caplog.records


def test_a_recording_that_fails_leaves_others_usable():
    device = torch.device("cuda")
    recorder, x = CudaRecorder(device), torch.ones(4, device=device)
    replay, result = recorder.record(lambda: x + 1)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            recorder.record(lambda: x * x.sum().item())  # waits for the device
    other_replay, other_result = recorder.record(lambda: x * 3)
    recorder.run([lambda: x.fill_(5), replay, other_replay])
    assert result.tolist() == [6] * 4
    assert other_result.tolist() == [15] * 4


@pytest.mark.parametrize("model_type", ModelType)
@pytest.mark.parametrize("options", [{}, {"prefix_precision": "fp8"}, {"compile_mode": "default"}], ids=str)
def test_recorded_calls_of_many_shapes_give_a_cpus_actions(model_type, options, tmp_path, caplog):
    make_checkpoint(tmp_path / "torch", config(model_type), layout="torch", dtype="float32")

    def load_on(device, **others):
        return load(config(model_type), open_torch_source(tmp_path / "torch"), device=device, **others)

    exact, fast = load_on("cpu", precision="float32"), load_on("cuda", **options)
    batches = [batch_of(1), batch_of(3, seed=1), batch_of(1, num_views=0, length=64), batch_of(1, num_steps=4)]
    first = [fast.sample_actions(batch) for batch in batches]
    for batch, actions in zip(batches, first, strict=True):
        expected = exact.sample_actions(batch)
        cosine = np.vdot(actions, expected) / (np.linalg.norm(actions) * np.linalg.norm(expected))
        assert cosine >= MIN_COSINE
        np.testing.assert_array_equal(fast.sample_actions(batch), actions)
    other = batch_of(1, seed=2)
    assert np.abs(fast.sample_actions(other) - first[0]).max() > 1e-2
    assert not caplog.records  # such as that of a shape which cannot be recorded
