"""Real-time chunking around the PyTorch model: the flow of chunks that continue others (../realtime.py).

Both use a model's `prepare` and `velocity` as they are, the latter with plain operations: the fused ones cannot be
differentiated, and take no norm that differs from token to token. Nothing here waits for the device, so that a CUDA
graph can hold all of it, the backward passes too: what they differentiate is made inside of the call, and they run in
the thread that records. Shapes: B batch, H action horizon, A action_dim, E expert width, L layers.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from openpi_flash_models import flow, realtime
from openpi_flash_models.torch.model import Context, Inputs, Pi0, Schedule, Step
from openpi_flash_models.torch.ops import REFERENCE


def sample_guided(model: Pi0, inputs: Inputs, schedule: Schedule) -> Tensor:
    """The flow, at each step drawn towards the chunks before: (B, H, A) float32.

    The velocity is corrected by a vector-Jacobian product, arXiv 2506.07339, eqs. 2 and 3; openpi's velocity points
    from actions to noise, the paper's the other way.

    Args:
        model: its weights, and the schedule, were not made in inference mode.
        inputs: the batch, with its continuation.
        schedule: one for each flow step.
    """
    assert inputs.previous is not None and inputs.weights is not None  # noqa: S101 - as documented
    dt = float(flow.step_size(len(schedule)))
    times, guidance = flow.timesteps(len(schedule)).tolist(), realtime.guidance(len(schedule)).tolist()
    with torch.autograd.set_multithreading_enabled(False), torch.inference_mode(False), torch.no_grad():
        context = model.prepare(inputs)
        x = inputs.noise.clone()
        for step, t, strength in zip(schedule, times, guidance, strict=True):
            x.requires_grad_()
            with torch.enable_grad(), plain_operations(model):
                v = model.velocity(x, step, forgetful(context))
                estimate = x - t * v
            error = inputs.weights[..., None] * (inputs.previous - estimate.detach())
            (correction,) = torch.autograd.grad(estimate, x, error)
            x = x.detach() + dt * (v.detach() - strength * correction)
    return x


def sample_committed(model: Pi0, inputs: Inputs, schedule: Schedule, done: Step) -> Tensor:
    """The flow around actions that are given, for a model that was trained for it: (B, H, A) float32.

    Args:
        model: the model.
        inputs: the batch, with its continuation.
        schedule: one for each flow step.
        done: the step at the end of the flow: what given actions meet throughout.
    """
    assert inputs.previous is not None and inputs.weights is not None  # noqa: S101 - as documented
    context, is_given = model.prepare(inputs), inputs.weights[..., None] > 0
    x, dt = torch.where(is_given, inputs.previous, inputs.noise), float(flow.step_size(len(schedule)))
    with plain_operations(model):
        for step in schedule:
            v = model.velocity(x, of_tokens(step, done, is_given), context)
            x = x + dt * v.masked_fill(is_given, 0)
    return x


def of_tokens(step: Step, done: Step, is_given: Tensor) -> Step:
    """A step as each token meets it, its rows (B, H, E): that of `done` where the action is given."""
    if step.modulation is None or done.modulation is None:
        assert step.time_bias is not None and done.time_bias is not None  # noqa: S101 - of pi0
        return Step(time_bias=torch.where(is_given, done.time_bias, step.time_bias))
    rows, rows_done = (modulation[:, :, None, None] for modulation in (step.modulation, done.modulation))
    return Step(torch.where(is_given, rows_done, rows))


def forgetful(context: Context) -> Context:
    """The same cache without its history: each flow step writes over what the one before wrote and differentiated."""
    return context._replace(cache=[own.detach() for own in context.cache])


@contextlib.contextmanager
def plain_operations(model: Pi0) -> Iterator[None]:
    ops, model.ops = model.ops, REFERENCE
    try:
        yield
    finally:
        model.ops = ops
