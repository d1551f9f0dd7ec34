"""The operations of ops.py for a GPU: Triton kernels, and libraries' where they are faster."""

from openpi_flash_models.torch.attention_kernels import fused_attend_suffix, hopper_attend_prefix
from openpi_flash_models.torch.expert_kernels import fused_norm_geglu, fused_norm_qkv, fused_project_add
from openpi_flash_models.torch.kernels import (
    addmm_gelu,
    fused_add_layer_norm,
    fused_add_rms_norm,
    fused_geglu,
    fused_quantise_rows,
    fused_rms_norm,
    fused_rotate_into_cache,
)
from openpi_flash_models.torch.ops import Ops
from openpi_flash_models.torch.stream_kernels import fused_embed, fused_read, fused_stream

FUSED = Ops(
    "fused",
    fused_rms_norm,
    fused_add_rms_norm,
    fused_add_layer_norm,
    addmm_gelu,
    fused_rotate_into_cache,
    fused_geglu,
    hopper_attend_prefix,
    fused_attend_suffix,
    fused_quantise_rows,
    fused_stream,
    fused_embed,
    fused_read,
    fused_norm_qkv,
    fused_norm_geglu,
    fused_project_add,
)
