"""Sizes of a pi0 or pi0.5 model. Frozen values; nothing here allocates."""

import dataclasses
import enum

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""The model's cameras, in the order of their tokens in the prefix."""

PROMPT_BUCKETS = (32, 64, 128, 200)
"""Lengths to which the valid prompt tokens are padded, so that shapes stay static (a model's own limit is added)."""


class ModelType(enum.StrEnum):
    PI0 = "pi0"
    PI05 = "pi05"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP vision tower. Defaults: So400m/14 at 224 pixels."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    image_size: int = 224
    patch_size: int = 14

    @property
    def num_tokens(self) -> int:
        """Tokens per camera."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """One expert. Both experts of a model share depth, num_heads, num_kv_heads and head_dim."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


GEMMA_VARIANTS = {
    "dummy": GemmaConfig(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
    "gemma_300m": GemmaConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
    "gemma_2b": GemmaConfig(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256),
}
"""openpi's variants. Its `*_lora` variants have the same sizes; their low-rank terms are merged when loaded."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes of a model.

    Attributes:
        action_dim: width of the padded action and state vectors.
        action_horizon: steps in an action chunk.
        max_token_len: most prompt tokens; longer prompts are cut from the right.
        discrete_state_input: the prompt carries the discretised state (pi0.5's format). pi0 always has it off.
    """

    model_type: ModelType = ModelType.PI05
    vision: VisionConfig = VisionConfig()
    vlm: GemmaConfig = GEMMA_VARIANTS["gemma_2b"]
    expert: GemmaConfig = GEMMA_VARIANTS["gemma_300m"]
    vocab_size: int = 257152
    action_dim: int = 32
    action_horizon: int = 50
    max_token_len: int = 200
    discrete_state_input: bool = True

    def __post_init__(self) -> None:
        shared = ("depth", "num_heads", "num_kv_heads", "head_dim")
        differing = [name for name in shared if getattr(self.vlm, name) != getattr(self.expert, name)]
        if differing:
            raise ValueError(
                f"the two experts must agree in {', '.join(shared)}; they differ in {', '.join(differing)}"
            )

    @property
    def is_pi05(self) -> bool:
        return self.model_type is ModelType.PI05

    @property
    def suffix_len(self) -> int:
        """Tokens of the suffix: the actions, and in pi0 the state before them."""
        return self.action_horizon if self.is_pi05 else self.action_horizon + 1

    @property
    def prompt_buckets(self) -> tuple[int, ...]:
        """Padded prompt lengths in use, ascending; the last one is max_token_len."""
        return (*(n for n in PROMPT_BUCKETS if n < self.max_token_len), self.max_token_len)

    def prompt_bucket(self, num_tokens: int) -> int:
        """Smallest bucket that holds `num_tokens` (≤ max_token_len)."""
        return next(n for n in self.prompt_buckets if n >= num_tokens)
