"""Policy configurations: a model's sizes, a robot, and how one meets the other. openpi's own are here by name."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpi_flash_models import realtime
from openpi_flash_models.config import CAMERAS, GEMMA_VARIANTS, ModelConfig, ModelType
from openpi_flash_models.errors import PolicyConfigError
from openpi_flash_models.normalize import Normalization
from openpi_flash_models.robots.aloha import aloha
from openpi_flash_models.robots.base import CameraEntry, Robot, StateEntry
from openpi_flash_models.robots.droid import DROID
from openpi_flash_models.robots.libero import LIBERO
from openpi_flash_models.robots.raw import raw

_LIBERO_ASSETS = "physical-intelligence/libero"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """All that a policy is besides its weights and statistics.

    Attributes:
        name: for logs and metadata.
        model: sizes.
        robot: what it sends and does.
        normalization: how the model was trained to see numbers.
        delta_action_mask: compact mask of the dimensions in which the model acts relative to the state, e.g.
            (6, -1, 6, -1); None: all actions are absolute.
        asset_id: folder of the statistics below a checkpoint's `assets`; may contain a slash.
        norm_stats: a `norm_stats.json` to use in place of the checkpoint's.
        default_prompt: used when an observation has none.
        tokenizer: sentencepiece model; None: PaliGemma's.
        metadata: sent to clients as it is, e.g. `reset_pose`.
        real_time_chunking: how the model continues a chunk: guided, or trained for it.
    """

    name: str
    model: ModelConfig
    robot: Robot
    normalization: Normalization
    delta_action_mask: tuple[int, ...] | None = None
    asset_id: str | None = None
    norm_stats: Path | None = None
    default_prompt: str | None = None
    tokenizer: Path | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    real_time_chunking: realtime.Method = realtime.Method.GUIDED

    def __post_init__(self) -> None:
        robot, width = self.robot, self.model.action_dim
        for what, dim in (("state", robot.state_dim), ("action", robot.action_dim)):
            if not 1 <= dim <= width:
                raise PolicyConfigError(
                    f"{self.name}: {dim} {what} dimensions do not fit the model's action_dim {width}"
                )
        if self.delta_action_mask is not None:
            masked, limit = sum(map(abs, self.delta_action_mask)), min(robot.state_dim, robot.action_dim)
            if masked > limit:
                raise PolicyConfigError(
                    f"{self.name}: delta_action_mask covers {masked} dimensions, state and actions share {limit}"
                )
        if self.normalization is not Normalization.NONE and self.asset_id is None and self.norm_stats is None:
            raise PolicyConfigError(
                f"{self.name}: asset_id or norm_stats is needed for {self.normalization} normalisation"
            )


def default_normalization(model_type: ModelType) -> Normalization:
    """openpi's rule: z-score for pi0, quantiles for the rest."""
    return Normalization.ZSCORE if model_type is ModelType.PI0 else Normalization.QUANTILE


def load_policy_config(name_or_path: str | Path) -> PolicyConfig:
    """A configuration of openpi's by name, or one's own from a JSON file (docs/custom-policy.md).

    Raises:
        PolicyConfigError: unknown (the nearest names are suggested), not served, or malformed.
    """
    name = str(name_or_path)
    if name in POLICY_CONFIGS:
        return POLICY_CONFIGS[name]
    if name in _NOT_SERVED:
        raise PolicyConfigError(f"policy configuration {name!r} is not served: {_NOT_SERVED[name]}")
    if name.endswith(".json") or Path(name).is_file():
        from openpi_flash_models.policy_config_file import read_policy_config

        return read_policy_config(Path(name))
    near = difflib.get_close_matches(name, POLICY_CONFIGS, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(sorted(POLICY_CONFIGS))}"
    raise PolicyConfigError(f"no policy configuration {name!r}, and no such file; {hint}")


def pi0(*, action_horizon: int = 50, max_token_len: int = 48, variants: tuple[str, str] | None = None) -> ModelConfig:
    """A pi0 model of the released sizes, or of the (VLM, expert) `variants`."""
    vlm, expert = variants or ("gemma_2b", "gemma_300m")
    return ModelConfig(
        model_type=ModelType.PI0,
        vlm=GEMMA_VARIANTS[vlm],
        expert=GEMMA_VARIANTS[expert],
        action_horizon=action_horizon,
        max_token_len=max_token_len,
        discrete_state_input=False,
    )


def pi05(
    *, action_horizon: int = 50, discrete_state_input: bool = True, variants: tuple[str, str] | None = None
) -> ModelConfig:
    """A pi0.5 model of the released sizes, or of the (VLM, expert) `variants`."""
    vlm, expert = variants or ("gemma_2b", "gemma_300m")
    return ModelConfig(
        vlm=GEMMA_VARIANTS[vlm],
        expert=GEMMA_VARIANTS[expert],
        action_horizon=action_horizon,
        discrete_state_input=discrete_state_input,
    )


def _config(name: str, model: ModelConfig, robot: Robot, asset_id: str, **options: Any) -> PolicyConfig:
    normalization = default_normalization(model.model_type)
    return PolicyConfig(name=name, model=model, robot=robot, normalization=normalization, asset_id=asset_id, **options)


def _aloha(name: str, model: ModelConfig, **options: Any) -> PolicyConfig:
    options = {"delta_action_mask": (6, -1, 6, -1), **options}
    return _config(name, model, aloha(adapt_to_pi=True), "trossen", **options)


def _debug(name: str, model: ModelConfig) -> PolicyConfig:
    # openpi's debug configurations have no robot: observations are in the model's own terms.
    cameras = tuple(CameraEntry(f"image/{camera}", camera) for camera in CAMERAS)
    robot = raw(cameras, (StateEntry("state", model.action_dim),), model.action_dim)
    return PolicyConfig(name=name, model=model, robot=robot, normalization=Normalization.NONE)


_RESET_POSE = {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}
_DUMMY = ("dummy", "dummy")

POLICY_CONFIGS: Mapping[str, PolicyConfig] = {
    config.name: config
    for config in (
        _aloha("pi0_aloha", pi0(), metadata=_RESET_POSE),
        _aloha("pi05_aloha", pi05(), metadata=_RESET_POSE),
        _aloha("pi0_aloha_towel", pi0(), metadata=_RESET_POSE, default_prompt="fold the towel"),
        _aloha(
            "pi0_aloha_tupperware",
            pi0(),
            metadata=_RESET_POSE,
            default_prompt="open the tupperware and put the food on the plate",
        ),
        _aloha("pi0_aloha_pen_uncap", pi0(), default_prompt="uncap the pen"),
        _aloha("pi05_aloha_pen_uncap", pi05(), default_prompt="uncap the pen"),
        _config(
            "pi0_aloha_sim",
            pi0(),
            aloha(adapt_to_pi=True),
            "lerobot/aloha_sim_transfer_cube_human",
            default_prompt="Transfer cube",
        ),
        _config("pi0_droid", pi0(action_horizon=10), DROID, "droid"),
        _config("pi05_droid", pi05(action_horizon=15), DROID, "droid"),
        _config("pi05_droid_finetune", pi05(action_horizon=16), DROID, "droid"),
        _config("pi05_full_droid_finetune", pi05(action_horizon=16), DROID, "droid", delta_action_mask=(7, -1)),
        _config("pi05_droid_jointpos_polaris", pi05(action_horizon=15), DROID, "droid", delta_action_mask=(7, -1)),
        *(
            _config(name, pi0(action_horizon=10, max_token_len=100), DROID, "droid", delta_action_mask=(7, -1))
            for name in ("pi0_droid_jointpos_polaris", "pi0_droid_jointpos_100k_polaris")
        ),
        _config("pi0_libero", pi0(), LIBERO, _LIBERO_ASSETS, delta_action_mask=(6, -1)),
        _config("pi0_libero_low_mem_finetune", pi0(), LIBERO, _LIBERO_ASSETS, delta_action_mask=(6, -1)),
        _config("pi05_libero", pi05(action_horizon=10, discrete_state_input=False), LIBERO, _LIBERO_ASSETS),
        _debug("debug", pi0(variants=_DUMMY)),
        _debug("debug_restore", pi0(variants=_DUMMY)),
        _debug("debug_pi05", pi05(variants=_DUMMY)),
    )
}
"""openpi's inference configurations for pi0 and pi0.5, by openpi's names."""

_AUTOREGRESSIVE = "it is an autoregressive (pi0-FAST) model; only the flow models pi0 and pi0.5 are served"
_NOT_SERVED = {
    **dict.fromkeys(
        (
            "pi0_fast_droid",
            "pi0_fast_droid_jointpos_polaris",
            "pi0_fast_full_droid_finetune",
            "pi0_fast_libero",
            "pi0_fast_libero_low_mem_finetune",
            "paligemma_binning_droid",
            "paligemma_binning_droid_jointpos_polaris",
            "paligemma_fast_droid",
            "paligemma_fast_specialist_droid",
            "paligemma_vq_droid",
        ),
        _AUTOREGRESSIVE,
    ),
    "paligemma_diffusion_droid": "openpi itself cannot create it: it passes an argument that its robot no longer has",
}
"""openpi's other configurations, and why they are not here."""
