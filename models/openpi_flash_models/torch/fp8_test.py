"""The prefix in FP8 on a CPU, which multiplies FP8 slowly and to the same numbers."""

import copy

import pytest
import torch

from openpi_flash_models.checkpoints.safetensors_source import open_torch_source
from openpi_flash_models.checkpoints.synthetic import make_checkpoint
from openpi_flash_models.config import GemmaConfig, ModelConfig, VisionConfig
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.torch import fp8
from openpi_flash_models.torch.backend import load
from openpi_flash_models.torch.model import Linear
from openpi_flash_models.torch.ops import FP8, REFERENCE

HEADS = {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
CONFIG = ModelConfig(
    vision=VisionConfig(width=32, depth=1, mlp_dim=48, num_heads=2, image_size=28),
    vlm=GemmaConfig(width=64, mlp_dim=96, **HEADS),
    expert=GemmaConfig(width=32, mlp_dim=48, **HEADS),
    vocab_size=32,
    action_dim=4,
    action_horizon=3,
    max_token_len=16,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8") / "checkpoint"
    make_checkpoint(path, CONFIG, layout="torch", dtype="float32")
    return path


def load_here(checkpoint, **options):
    return load(CONFIG, open_torch_source(checkpoint), num_steps=2, **options)


@pytest.mark.parametrize(("bias", "last"), [(True, 0), (False, 0), (False, 5)])
def test_a_product_is_that_of_the_rounded_factors(bias, last):
    generator = torch.Generator().manual_seed(0)
    matrix = Linear(64, 48, bias=bias, dtype=torch.bfloat16)
    for parameter in matrix.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = (torch.randn(2, 3, 64, generator=generator) * torch.tensor([1e-3, 1.0, 1e3])[:, None]).bfloat16()
    exact = copy.deepcopy(matrix)
    matrix.quantise()
    assert matrix.weight.dtype == FP8
    actual = matrix(x, REFERENCE, last=last)

    def rounded(tensor):
        scale = tensor.float().abs().amax(-1, keepdim=True) / 448
        return (tensor.float() / scale).to(FP8).float() * scale

    expected = rounded(x) @ rounded(exact.weight).T
    expected = (expected + exact.bias.float() if bias else expected)[..., -last:]
    torch.testing.assert_close(actual, expected.bfloat16(), rtol=2e-2, atol=2e-2)
    unrounded = exact(x, REFERENCE, last=last).float()
    assert torch.nn.functional.cosine_similarity(actual.float(), unrounded, dim=-1).min() > 0.99


def test_the_prefix_is_rounded_and_the_expert_is_not(checkpoint):
    model = load_here(checkpoint, prefix_precision="fp8").model
    assert {matrix.weight.dtype for matrix in fp8.prefix_matrices(model)} == {FP8}
    others = {parameter.dtype for layer in model.expert for parameter in layer.parameters()}
    assert others == {torch.bfloat16}


def test_weights_that_fp8_moves_too_far_are_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(fp8, "MIN_COSINE", 1.0)
    with pytest.raises(PolicyConfigError, match=r"prefix_precision: fp8 changes .* cosine with bfloat16 is 0\.99"):
        load_here(checkpoint, prefix_precision="fp8")


def test_a_gpu_without_fp8_is_refused(checkpoint, monkeypatch):
    model = load_here(checkpoint).model
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(model, "embedding", OnGpu())
    with pytest.raises(PolicyConfigError, match=r"prefix_precision: fp8 needs .* 8\.9 or more; cuda:0 has 8\.6"):
        fp8.quantise_prefix(model, 2)


class OnGpu(torch.nn.Parameter):
    """Says that it is on a GPU."""

    device = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_precision": "int4"}, "prefix_precision: 'int4' is unknown; expected fp8"),
        ({"prefix_precision": "fp8", "precision": "float32"}, "prefix_precision: fp8 goes with .* bfloat16, not"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(checkpoint, options, message):
    with pytest.raises(PolicyConfigError, match=message):
        load_here(checkpoint, **options)
