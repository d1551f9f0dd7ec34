"""Real-time chunking around the PyTorch model: the flow of chunks that continue others (../realtime.py).

Both use a model's `prepare` and `velocity` as they are. Shapes: B batch, n suffix tokens, H action horizon, A
action_dim, E expert width.
"""

import torch
from torch import Tensor

from openpi_flash_models import flow, realtime
from openpi_flash_models.torch.model import Cache, Context, Inputs, Pi0, Schedule


def sample_guided(model: Pi0, inputs: Inputs, schedule: Schedule, actions: Tensor, weights: Tensor) -> Tensor:
    """The flow, at each step drawn towards the chunks before: (B, H, A) float32.

    The velocity is corrected by a vector-Jacobian product, arXiv 2506.07339, eqs. 2 and 3; openpi's velocity points
    from actions to noise, the paper's the other way. Not to be called in inference mode, which knows no gradients.

    Args:
        model: its weights need no gradient.
        inputs: the batch.
        schedule: a row for each flow step.
        actions: (B, H, A) float32, as in `realtime.Continuation`.
        weights: (B, H) float32, likewise.
    """
    with torch.no_grad():
        context = model.prepare(inputs)
    num_steps = len(schedule.modulation)
    x, dt = inputs.noise, float(flow.step_size(num_steps))
    times, guidance = flow.timesteps(num_steps).tolist(), realtime.guidance(num_steps).tolist()
    for step, (t, strength) in enumerate(zip(times, guidance, strict=True)):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            v = model.velocity(x, step, schedule, forgetful(context))
            estimate = x - t * v
        error = weights[..., None] * (actions - estimate.detach())
        (correction,) = torch.autograd.grad(estimate, x, error)
        x = x.detach() + dt * (v.detach() - strength * correction)
    return x


def sample_committed(
    model: Pi0, inputs: Inputs, schedule: Schedule, *, done: Schedule, actions: Tensor, weights: Tensor
) -> Tensor:
    """The flow around actions that are given, for a model that was trained for it: (B, H, A) float32.

    Args:
        model: the model.
        inputs: the batch.
        schedule: a row for each flow step.
        done: one row, of the end of the flow: what given actions meet in every flow step.
        actions: (B, H, A) float32, as in `realtime.Continuation`.
        weights: (B, H) float32, likewise: 1 where the action is given, 0 elsewhere.
    """
    context = model.prepare(inputs)
    is_given = weights[..., None] > 0
    x, dt = torch.where(is_given, actions, inputs.noise), float(flow.step_size(len(schedule.modulation)))
    for step in range(len(schedule.modulation)):
        v = model.velocity(x, 0, of_tokens(schedule, step, done, is_given), context)
        x = x + dt * v.masked_fill(is_given, 0)
    return x


def of_tokens(schedule: Schedule, step: int, done: Schedule, is_given: Tensor) -> Schedule:
    """A schedule of one step as tokens meet it, its rows (B, n, E), with those of `done` where an action is given."""
    if schedule.time_bias is not None and done.time_bias is not None:
        # pi0's modulation is the same in every step.
        time_bias = torch.where(is_given, done.time_bias, schedule.time_bias[step])
        return Schedule(schedule.modulation[step : step + 1], time_bias[None])
    rows, rows_done = schedule.modulation[step], done.modulation[0]
    modulation = torch.where(is_given, rows_done[:, :, None, None], rows[:, :, None, None])
    return Schedule(modulation[None], None)


def forgetful(context: Context) -> Context:
    """The same cache without its history: each flow step writes over what the one before wrote and differentiated."""
    cache = Cache(*([array.detach() for array in arrays] for arrays in context.cache))
    return context._replace(cache=cache)
