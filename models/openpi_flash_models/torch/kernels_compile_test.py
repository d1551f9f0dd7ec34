"""Every Triton kernel, compiled for GPUs that need not be there, as a full-size inference would launch it.

Where a kernel fails on a GPU, plain PyTorch takes its place with a warning: one that cannot be compiled, needs more
shared memory than there is, or keeps its numbers outside of registers costs speed, and nothing else says so. Here the
model runs on the meta device, where tensors have no contents, and a launch compiles and does no more: what is compiled
has the types, constants and options of the launch. `pytest -rP` prints what each kernel needs.
"""

import dataclasses
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from openpi_flash_models.config import ModelConfig, ModelType
from openpi_flash_models.torch import attention_kernels, expert_kernels, fp8, kernels, stream_kernels
from openpi_flash_models.torch.backend_test import full_size_inputs
from openpi_flash_models.torch.fused import FUSED
from openpi_flash_models.torch.launch import HOPPER, triton
from openpi_flash_models.torch.model import Pi0

if sys.platform != "linux":
    pytest.skip("PyTorch brings Triton on Linux alone: here is none", allow_module_level=True)

SHARED_KIB = {80: 163, 89: 99, 90: 227}
"""By compute capability (A100; L4 and RTX 4090; H100 and H200): the shared memory that one program may have."""

KERNELS = {
    name: (module, value)
    for module in (kernels, attention_kernels, expert_kernels, stream_kernels)
    for name, value in vars(module).items()
    if isinstance(value, triton.JITFunction) and name.endswith("_kernel")  # others are parts of these
}


class Case(NamedTuple):
    capability: int
    dtype: torch.dtype
    model_type: ModelType = ModelType.PI05
    quantised: bool = False


CASES = [
    *(Case(capability, dtype) for capability in SHARED_KIB for dtype in (torch.bfloat16, torch.float32)),
    *(Case(capability, torch.bfloat16, quantised=True) for capability in SHARED_KIB if capability >= 89),
    Case(90, torch.bfloat16, ModelType.PI0),
]


class Driver:
    """Tells Triton of a GPU."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # what was compiled is kept for each device

    def get_current_stream(self, device):
        return 0


class Kernel:
    """Stands for a kernel, and compiles what would be launched."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            self.compiled[compiled.hash] = compiled

        return launch


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What was compiled, by hash."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's own choice, without its warning
    found = {}
    for name, (module, kernel) in KERNELS.items():
        monkeypatch.setattr(module, name, Kernel(kernel, found))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_compiles_and_fits(compiled, monkeypatch, tmp_path, case):
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(case.capability))
    run_full_size(case)
    assert not misfits(compiled, case.capability, tmp_path)
    unused = {"_embed_kernel" if case.model_type is ModelType.PI0 else "_stream_kernel"}
    unused |= set() if case.quantised else {"_quantise_kernel"}
    if case.capability != HOPPER or case.dtype == torch.float32:
        unused.add("_tiled_attend_kernel")
    assert {kernel.name for kernel in compiled.values()} == set(KERNELS) - unused


@pytest.mark.parametrize("tiles", attention_kernels.PREFIX_TILES, ids=str)
def test_attention_of_the_prefix_compiles_and_fits_however_it_is_divided(compiled, monkeypatch, tmp_path, tiles):
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(HOPPER))
    sizes = ModelConfig().vlm
    with torch.device("meta"):
        q = torch.empty(1, 816, sizes.num_heads, sizes.head_dim, dtype=torch.bfloat16)
        cache = torch.empty(2, 1, 866, sizes.num_kv_heads, sizes.head_dim, dtype=torch.bfloat16)
        attention_kernels.tiled_attend_prefix(q, cache, torch.empty(1, dtype=torch.int32), tiles=tiles)
    assert not misfits(compiled, HOPPER, tmp_path)
    (kernel,) = compiled.values()
    assert "wgmma.mma_async" in kernel.asm["ptx"]


def run_full_size(case):
    """One call of three views and two flow steps. Two layers launch what eighteen do."""
    sizes = ModelConfig(model_type=case.model_type)
    parts = {name: dataclasses.replace(getattr(sizes, name), depth=2) for name in ("vision", "vlm", "expert")}
    with torch.device("meta"), torch.inference_mode():
        model = Pi0(dataclasses.replace(sizes, **parts), case.dtype)
        model.ops = FUSED
        if case.quantised:
            for matrix in fp8.prefix_matrices(model):
                matrix.quantise()
        model.sample_actions(full_size_inputs(), model.schedule(torch.empty(2, 1024)))


def misfits(compiled, capability, folder):
    """What kernels need, of those that are too large for a GPU."""
    found = []
    for kernel in compiled.values():
        registers, stack = resources(kernel, folder)
        shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
        needs = f"{kernel.name}: {warps} warps, {registers} registers, {shared} bytes shared, {stack} bytes spilled"
        print(needs)
        if stack or shared > SHARED_KIB[capability] * 1024:
            found.append(needs)
    return found


def resources(kernel, folder):
    """Registers of a thread, and the bytes of what did not fit into them."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers,), (stack,), (local,) = (re.findall(rf"\b{name}:(\d+)", report) for name in ("REG", "STACK", "LOCAL"))
    return int(registers), int(stack) + int(local)
