"""Each Triton kernel against plain PyTorch, under Triton's interpreter, which runs kernels on a CPU.

Triton decides when it is imported whether it interprets, so that these tests run in a process of their own, which the
last one starts.
"""

import functools
import os
import subprocess
import sys

import pytest
import torch

from openpi_flash_models.config import GemmaConfig, ModelConfig, VisionConfig
from openpi_flash_models.torch import attention_kernels, kernels, selection
from openpi_flash_models.torch import ops as plain
from openpi_flash_models.torch.fused import FUSED

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32)


def config(*, num_kv_heads=1, head_dim=10):
    heads = {"depth": 1, "num_heads": 4, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    return ModelConfig(
        vision=VisionConfig(width=12, depth=1, mlp_dim=20, num_heads=3, image_size=28),
        vlm=GemmaConfig(width=37, mlp_dim=53, **heads),
        expert=GemmaConfig(width=128, mlp_dim=1030, **heads),
        vocab_size=64,
    )


@pytest.mark.parametrize(
    "op",
    [
        "rms_norm",
        "add_rms_norm",
        "add_layer_norm",
        "linear_gelu",
        "rotate_into_cache",
        "geglu",
        "attend_suffix",
        "quantise_rows",
    ],
)
def test_a_wrong_kernel_is_found(op):
    def wrong(*arguments):
        result = getattr(plain.REFERENCE, op)(*arguments)
        first = result if isinstance(result, torch.Tensor) else result[-1]
        first[0] = 1.5
        return result

    ops = plain.REFERENCE._replace(**{op: wrong})
    assert op in selection.mismatches(ops, config(), CPU, torch.float32)
    assert selection.mismatches(plain.REFERENCE, config(), CPU, torch.float32) == {}


def test_a_kernel_that_fails_is_found_and_says_why():
    def fails(gate_up):
        raise RuntimeError("Failed to find C compiler")

    wrong = selection.mismatches(plain.REFERENCE._replace(geglu=fails), config(), CPU, torch.float32)
    assert wrong == {"geglu": "RuntimeError: Failed to find C compiler"}


def test_a_cpu_has_no_use_for_them():
    assert selection.choose(config(), CPU, torch.bfloat16) is plain.REFERENCE


if INTERPRETED:

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("sizes", [{}, {"num_kv_heads": 2, "head_dim": 16}, {"num_kv_heads": 4}], ids=str)
    def test_every_kernel_gives_what_plain_pytorch_gives(dtype, sizes):
        # FlashAttention and cuBLASLt's GELU are PyTorch's own, and no CPU has them.
        fused = FUSED._replace(attend_prefix=attention_kernels.fused_attend_suffix, linear_gelu=plain.linear_gelu)
        if dtype == torch.bfloat16:  # of which the interpreter multiplies the bits
            products = ("attend_prefix", "attend_suffix", "norm_qkv", "norm_geglu", "project_add")
            fused = fused._replace(**{name: getattr(plain.REFERENCE, name) for name in products})
        assert selection.mismatches(fused, config(**sizes), CPU, dtype) == {}

    @pytest.mark.parametrize("num_heads_each", [2, 3, 6])
    def test_rotations_are_the_same_however_many_heads_a_program_has(num_heads_each):
        rotate = functools.partial(kernels.fused_rotate_into_cache, num_heads_each=num_heads_each)
        fused = plain.REFERENCE._replace(rotate_into_cache=rotate)
        for sizes in ({}, {"num_kv_heads": 2, "head_dim": 16}):
            assert selection.mismatches(fused, config(**sizes), CPU, torch.bfloat16) == {}

    @pytest.mark.parametrize("sizes", [{"head_dim": 16}, {"num_kv_heads": 2, "head_dim": 20}], ids=str)
    def test_tiled_attention_gives_what_plain_pytorch_gives(sizes):
        fused = plain.REFERENCE._replace(attend_prefix=attention_kernels.tiled_attend_prefix)
        assert selection.mismatches(fused, config(**sizes), CPU, torch.float32) == {}

    @pytest.mark.parametrize("length", [1, 16, 33, 80])
    def test_tiled_attention_sees_the_valid_keys_and_no_other(length):
        generator = torch.Generator().manual_seed(0)
        q, cache = torch.randn(2, 80, 4, 16, generator=generator), torch.randn(2, 2, 90, 2, 16, generator=generator)
        lengths = torch.tensor([length, 80], dtype=torch.int32)
        expected = plain.attend_prefix(q, cache, lengths)
        cache[:, 0, length:] = 1e3  # finite, as a cache is
        cache[:, 1, 80:] = 1e3
        actual = attention_kernels.tiled_attend_prefix(q, cache, lengths)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("splits", [1, 3, 16])
    @pytest.mark.parametrize("length", [1, 33, 97])
    def test_attention_sees_the_valid_keys_and_no_other_however_they_are_shared_out(splits, length):
        generator = torch.Generator().manual_seed(0)
        q, cache = torch.randn(1, 3, 4, 16, generator=generator), torch.randn(2, 1, 100, 2, 16, generator=generator)
        lengths = torch.tensor([length], dtype=torch.int32)
        expected = plain.attend(q, cache, lengths)
        cache[:, :, length:] = torch.nan  # a kernel has no business there
        actual = attention_kernels.fused_attend_suffix(q, cache, lengths, splits=splits)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("rows", [1, 16, 37])
    @pytest.mark.parametrize("splits", [1, 2, 3, 5])
    def test_a_product_is_the_same_however_it_is_shared_out(splits, rows):
        generator = torch.Generator().manual_seed(0)
        y, weight, x = (torch.randn(*shape, generator=generator) for shape in ((rows, 150), (40, 150), (rows, 40)))
        gate, factor, gate_up = (torch.randn(*shape, generator=generator) for shape in ((40,), (40,), (24, 40)))

        def call(ops, **tiles):
            norm = plain.Norm(factor)
            added = ops.project_add(y[None], weight, ops.stream(x[None], norm), gate, norm, **tiles)
            return added.x, ops.norm_geglu(added, norm, gate_up)

        for _ in range(2):  # whoever counts starts at zero again
            torch.testing.assert_close(call(FUSED, SPLITS=splits), call(plain.REFERENCE), rtol=1e-4, atol=1e-4)

else:

    @pytest.mark.skipif(
        sys.platform != "linux", reason="no package of Triton for this system: PyTorch brings it on Linux alone"
    )
    def test_kernels_under_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
