"""Puts a planner together from a configuration and a checkpoint."""

import contextlib
from pathlib import Path

from openpi_flash_models.checkpoints.detect import Checkpoint, Layout, detect
from openpi_flash_models.checkpoints.download import resolve
from openpi_flash_models.errors import CheckpointError
from openpi_flash_models.planner.config import PlannerConfig
from openpi_flash_models.planner.decoder import load_decoder
from openpi_flash_models.planner.planner import Planner
from openpi_flash_models.planner.vocabulary import subtask_vocabulary
from openpi_flash_models.tokenizer import TOKENIZER_URI, PromptTokenizer


def load_planner(
    config: PlannerConfig,
    checkpoint_dir: Path,
    *,
    device: str | None = None,
    precision: str = "bfloat16",
    default_prompt: str | None = None,
    max_batch_size: int = 1,
    tokenizer: Path | None = None,
    compilation_cache: Path | None = None,
    data_home: Path | None = None,
) -> Planner:
    """Loads weights and tokenizer. Nothing is compiled yet: see `Planner.warm_up`.

    Args:
        config: from `load_planner_config`.
        checkpoint_dir: a local pi0.5 checkpoint with `params/` (Orbax). Its action expert is not read.
        device: a JAX platform, e.g. `cuda` or `cpu`; None: JAX's own choice.
        precision: `bfloat16` or `float32`.
        default_prompt: goes before the configuration's.
        max_batch_size: most requests in a model call.
        tokenizer: a sentencepiece model; None: the configuration's, else PaliGemma's, fetched when it is not cached.
        compilation_cache: where JAX keeps compiled programs; None: below `data_home` where that is given, and for a CPU
            nowhere.
        data_home: the cache of the tokenizer; see `resolve`.

    Raises:
        CheckpointError: weights or tokenizer are missing, do not fit, or are not what a planner can use.
        PolicyConfigError: an option is out of range.
        DownloadError: PaliGemma's tokenizer could not be fetched.
    """
    checkpoint = _detect(checkpoint_dir)
    prompt_tokenizer = PromptTokenizer(tokenizer or config.tokenizer or resolve(TOKENIZER_URI, data_home=data_home))
    allowed = subtask_vocabulary(prompt_tokenizer, config.model.vocab_size)
    with contextlib.closing(checkpoint.open()) as source:
        if "state_proj/kernel" in source.names():
            raise CheckpointError(f"{checkpoint_dir}: a pi0 checkpoint; a planner needs one of pi0.5")
        decoder = load_decoder(
            config.model,
            source,
            allowed,
            device=device,
            precision=precision,
            compilation_cache=compilation_cache,
            data_home=data_home,
        )
    return Planner(config, decoder, prompt_tokenizer, default_prompt=default_prompt, max_batch_size=max_batch_size)


def _detect(path: Path) -> Checkpoint:
    try:
        return detect(path, layout=Layout.JAX)
    except CheckpointError:
        # Raises as it is where there is no checkpoint at all.
        detect(path)
        raise CheckpointError(
            f"{path}: holds PyTorch weights only; a planner runs in JAX and needs params/ written by Orbax"
        ) from None
