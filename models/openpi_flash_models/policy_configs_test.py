"""openpi's named configurations, as SPEC's table has them."""

import pytest

from openpi_flash_models.config import ModelType
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.normalize import Normalization
from openpi_flash_models.policy_configs import POLICY_CONFIGS, load_policy_config

# name: model, horizon, robot, delta mask, asset id, default prompt
ALOHA_DELTA, LIBERO_ASSETS = (6, -1, 6, -1), "physical-intelligence/libero"
TABLE = {
    "pi0_aloha": ("pi0", 50, "aloha", ALOHA_DELTA, "trossen", None),
    "pi05_aloha": ("pi05", 50, "aloha", ALOHA_DELTA, "trossen", None),
    "pi0_aloha_towel": ("pi0", 50, "aloha", ALOHA_DELTA, "trossen", "fold the towel"),
    "pi0_aloha_tupperware": (
        "pi0",
        50,
        "aloha",
        ALOHA_DELTA,
        "trossen",
        "open the tupperware and put the food on the plate",
    ),
    "pi0_aloha_pen_uncap": ("pi0", 50, "aloha", ALOHA_DELTA, "trossen", "uncap the pen"),
    "pi05_aloha_pen_uncap": ("pi05", 50, "aloha", ALOHA_DELTA, "trossen", "uncap the pen"),
    "pi0_aloha_sim": ("pi0", 50, "aloha", None, "lerobot/aloha_sim_transfer_cube_human", "Transfer cube"),
    "pi0_droid": ("pi0", 10, "droid", None, "droid", None),
    "pi05_droid": ("pi05", 15, "droid", None, "droid", None),
    "pi05_droid_finetune": ("pi05", 16, "droid", None, "droid", None),
    "pi05_full_droid_finetune": ("pi05", 16, "droid", (7, -1), "droid", None),
    "pi05_droid_jointpos_polaris": ("pi05", 15, "droid", (7, -1), "droid", None),
    "pi0_droid_jointpos_polaris": ("pi0", 10, "droid", (7, -1), "droid", None),
    "pi0_droid_jointpos_100k_polaris": ("pi0", 10, "droid", (7, -1), "droid", None),
    "pi0_libero": ("pi0", 50, "libero", (6, -1), LIBERO_ASSETS, None),
    "pi0_libero_low_mem_finetune": ("pi0", 50, "libero", (6, -1), LIBERO_ASSETS, None),
    "pi05_libero": ("pi05", 10, "libero", None, LIBERO_ASSETS, None),
    "debug": ("pi0", 50, "raw", None, None, None),
    "debug_restore": ("pi0", 50, "raw", None, None, None),
    "debug_pi05": ("pi05", 50, "raw", None, None, None),
}


def test_every_configuration_is_as_in_openpi():
    found = {
        name: (
            c.model.model_type,
            c.model.action_horizon,
            c.robot.name,
            c.delta_action_mask,
            c.asset_id,
            c.default_prompt,
        )
        for name, c in POLICY_CONFIGS.items()
    }
    assert found == TABLE


@pytest.mark.parametrize("config", POLICY_CONFIGS.values(), ids=lambda config: config.name)
def test_what_follows_from_the_model_type(config):
    is_pi05 = config.model.model_type is ModelType.PI05
    if config.robot.name != "raw":
        assert config.normalization is (Normalization.QUANTILE if is_pi05 else Normalization.ZSCORE)
    assert config.model.discrete_state_input == (is_pi05 and config.name != "pi05_libero")
    expected = 200 if is_pi05 else 100 if "polaris" in config.name else 48
    assert config.model.max_token_len == expected
    assert config.model.action_dim == 32
    assert config.model.vlm.width == (64 if config.name.startswith("debug") else 2048)


def test_only_the_released_aloha_models_carry_a_reset_pose():
    assert {name for name, config in POLICY_CONFIGS.items() if config.metadata} == {
        "pi0_aloha",
        "pi05_aloha",
        "pi0_aloha_towel",
        "pi0_aloha_tupperware",
    }
    assert POLICY_CONFIGS["pi05_aloha"].metadata == {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pi05_driod", "no policy configuration 'pi05_driod', and no such file; did you mean 'pi05_droid'"),
        ("zzz", "known: debug, "),
        ("pi0_fast_droid", r"'pi0_fast_droid' is not served: it is an autoregressive \(pi0-FAST\) model"),
        ("paligemma_vq_droid", "is not served: it is an autoregressive"),
        ("paligemma_diffusion_droid", "is not served: openpi itself cannot create it"),
        ("absent/my.json", r"cannot read the policy configuration absent/my\.json"),
    ],
)
def test_unknown_names_are_explained(name, message):
    with pytest.raises(PolicyConfigError, match=message):
        load_policy_config(name)
