"""The formulas against PyTorch's own count of a model's products."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openpi_flash_models.config import GemmaConfig, ModelConfig, ModelType, VisionConfig
from openpi_flash_models.cost import Cost, action_costs, layer_weights, planner_costs
from openpi_flash_models.torch.model import Inputs, Pi0

HEADS = {"depth": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
CONFIG = ModelConfig(
    vision=VisionConfig(width=24, depth=2, mlp_dim=40, num_heads=2, image_size=28),
    vlm=GemmaConfig(width=32, mlp_dim=48, **HEADS),
    expert=GemmaConfig(width=16, mlp_dim=20, **HEADS),
    vocab_size=64,
    action_dim=6,
    action_horizon=5,
    max_token_len=16,
)


@pytest.mark.parametrize("model_type", ModelType)
@pytest.mark.parametrize("num_views", [0, 2])
def test_operations_are_those_that_pytorch_counts(model_type, num_views):
    config = dataclasses.replace(CONFIG, model_type=model_type)
    with torch.device("meta"), torch.inference_mode():
        model = Pi0(config, torch.float32)
        schedule = model.schedule(torch.empty(3, 16))
        inputs = Inputs(
            images=torch.empty(2, num_views, 28, 28, 3, dtype=torch.uint8),
            tokens=torch.empty(2, 16, dtype=torch.int32),
            token_mask=torch.empty(2, 16, dtype=torch.bool),
            state=torch.empty(2, 6),
            noise=torch.empty(2, 5, 6),
        )
        with FlopCounterMode(display=False) as counter:
            model.sample_actions(inputs, schedule)
    costs = action_costs(config, batch=2, num_views=num_views, prompt=16, num_steps=3)
    assert sum(cost.flops for cost in costs.values()) == counter.get_total_flops()


def test_a_full_size_pi05_costs_what_is_known_of_it():
    costs = action_costs(ModelConfig(), batch=1, num_views=3, prompt=64, num_steps=10)
    # 3·256 + 64 tokens through 1982 M parameters, of whose last layer little is used; the expert's 311 M ten times.
    assert costs["prefix"].flops == pytest.approx(2 * 832 * 1982e6 * 17 / 18, rel=0.05)
    assert costs["flow"].num_bytes == pytest.approx(10 * 2 * 311.4e6, rel=0.05)
    assert 18 * layer_weights(ModelConfig().vlm) == pytest.approx(1981.9e6, rel=1e-3)
    further = planner_costs(ModelConfig(), num_views=3, prompt=64)["further"]
    assert further.num_bytes == pytest.approx(2 * (1982e6 + 526.6e6), rel=0.01)


def test_the_longer_of_computing_and_reading_counts():
    assert Cost(100, 10).seconds(flops_per_s=50, bytes_per_s=10) == 2
    assert Cost(100, 10).seconds(flops_per_s=500, bytes_per_s=10) == 1
