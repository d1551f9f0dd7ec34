"""What the PyTorch model computes on the way to the actions, under the names that `golden.cases` compares."""

import numpy as np
import torch

from openpi_flash_models import flow
from openpi_flash_models.request import ModelBatch
from openpi_flash_models.torch.backend import TorchBackend
from openpi_flash_models.torch.model import Context, standardise


def intermediates(backend: TorchBackend, batch: ModelBatch, time_embeddings: np.ndarray) -> dict[str, np.ndarray]:
    """Runs the model piece by piece, with given time embeddings (steps, E), and keeps what each piece returned.

    Shapes are those of model.py; the views of a batch stay apart (B, V, …), caches are (L, B, S, K, h).
    """
    model, config = backend.model, backend.config
    inputs = backend.upload(batch)
    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        if num_views := inputs.images.shape[1]:
            stem = model.vision.embed_patches(inputs.images.flatten(0, 1))
            encoded = model.vision.encode(stem, model.ops)
            block0, _ = model.vision.blocks[0](stem, standardise(stem), model.ops, None, None)
            vision = {"stem_posemb": stem, "block0": block0, "encoded": encoded}
            vision["projected"] = model.vision.projector(encoded, model.ops)
            found |= {f"vit_{name}": views.unflatten(0, (-1, num_views)) for name, views in vision.items()}
        found["prefix_embeds"], valid = model.embed_prefix(inputs)
        cache, out = model.prefix_forward(found["prefix_embeds"], valid, hidden=True)
        assert out is not None  # noqa: S101 - asked for
        found["prefix_out"] = out
        found["prefix_k"], found["prefix_v"] = torch.stack(cache, 1)

        embeddings = torch.from_numpy(time_embeddings)
        schedule, context = model.schedule(embeddings), model.prepare(inputs)
        norms = model.expert_norms(schedule[0])
        actions = model.embed_actions(inputs.noise, schedule[0], norms[0])
        actions_out = model.suffix_forward(actions, norms, context)
        if config.is_pi05:
            found["adarms_cond_t1"] = model.timing.condition(embeddings[:1]).expand(len(batch.tokens), -1)
            found["suffix_embeds_t1"], found["suffix_out_t1"] = actions.x, actions_out
        else:
            state = model.embed_state(inputs.state)
            # Once more, in a cache in which the actions already are: the state token must not see them.
            span = model.suffix_span(context.span.lengths - config.suffix_len, 1)
            state_out = model.suffix_forward(model.ops.stream(state, norms[0]), norms, Context(context.cache, span))
            found["suffix_embeds_t1"] = torch.cat([state, actions.x], 1)
            found["suffix_out_t1"] = torch.cat([state_out, actions_out], 1)
        x, dt = [inputs.noise], float(flow.step_size(len(time_embeddings)))
        v: list[torch.Tensor] = []
        for step in schedule:
            v.append(model.velocity(x[-1], step, context))
            x.append(x[-1] + dt * v[-1])
        found |= {"v_t1": v[0], "x_trajectory": torch.stack(x, 1), "v_trajectory": torch.stack(v, 1)}
        return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}
