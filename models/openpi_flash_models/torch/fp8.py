"""The prefix in FP8: half the bytes and twice the rate of its products, where the weights allow it.

Each row of a matrix is divided by a float32 number of its own when it is loaded, and each token by one of its own when
it is multiplied, so that the largest element of each is FP8's largest. The action expert stays in bfloat16: its few
tokens make its time that of launches and of reading weights that are a tenth of the prefix's.
"""

from collections.abc import Iterator

import torch

from openpi_flash_models.checkpoints.check import MIN_COSINE, random_batch
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.torch.graphs import upload
from openpi_flash_models.torch.model import Linear, Pi0, make_schedule

MIN_CAPABILITY = (8, 9)
"""Of a GPU that multiplies FP8: Ada and Hopper."""

MULTIPLE = 16
"""What a GPU wants the sides of an FP8 matrix to be multiples of."""


def quantise_prefix(model: Pi0, num_steps: int) -> None:
    """Turns the matrices of the vision tower and the VLM to FP8, and compares actions before and after.

    Raises:
        PolicyConfigError: the device cannot, or the actions move too far.
    """
    device = model.embedding.device
    matrices = list(prefix_matrices(model))
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            raise PolicyConfigError(
                f"prefix_precision: fp8 needs a GPU of compute capability 8.9 or more; {device} has "
                f"{'.'.join(map(str, capability))}"
            )
        if odd := [tuple(each.weight.shape) for each in matrices if any(n % MULTIPLE for n in each.weight.shape)]:
            raise PolicyConfigError(
                f"prefix_precision: fp8 needs matrices whose sides are multiples of {MULTIPLE}; this model has {odd[0]}"
            )
    with torch.inference_mode():
        inputs, schedule = upload(random_batch(model.config, seed=0), device), make_schedule(model, num_steps)
        before = model.sample_actions(inputs, schedule).flatten()
        for matrix in matrices:
            matrix.quantise()
        after = model.sample_actions(inputs, schedule).flatten()
        cosine = float(torch.nn.functional.cosine_similarity(before, after, dim=0))
    if not cosine >= MIN_COSINE:
        raise PolicyConfigError(
            f"prefix_precision: fp8 changes this checkpoint's actions too much: of a trial the cosine with bfloat16 is "
            f"{cosine:.5f}, at least {MIN_COSINE} is expected; leave prefix_precision out"
        )


def prefix_matrices(model: Pi0) -> Iterator[Linear]:
    """Those that are multiplied once for each request."""
    for part in (model.vision, *model.vlm):
        yield from (module for module in part.modules() if isinstance(module, Linear))
