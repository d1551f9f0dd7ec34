"""Puts a policy together from a configuration and a checkpoint."""

import contextlib
import importlib
from pathlib import Path
from typing import Any

from openpi_flash_models import flow
from openpi_flash_models.checkpoints.detect import Checkpoint, Layout, detect
from openpi_flash_models.checkpoints.download import resolve
from openpi_flash_models.errors import CheckpointError, PolicyConfigError
from openpi_flash_models.normalize import Normalization, NormStats, load_norm_stats
from openpi_flash_models.policy import Policy
from openpi_flash_models.policy_configs import PolicyConfig
from openpi_flash_models.request import Backend
from openpi_flash_models.tokenizer import TOKENIZER_URI, PromptTokenizer

BACKENDS = ("auto", "torch", "jax")


def load_policy(
    config: PolicyConfig,
    checkpoint_dir: Path,
    *,
    backend: str = "auto",
    device: str | None = None,
    precision: str = "bfloat16",
    prefix_precision: str | None = None,
    compile_mode: str | None = None,
    num_steps: int = flow.DEFAULT_NUM_STEPS,
    default_prompt: str | None = None,
    max_batch_size: int = 1,
    real_time_chunking: bool = False,
    tokenizer: Path | None = None,
    compilation_cache: Path | None = None,
    data_home: Path | None = None,
) -> Policy:
    """Loads weights, statistics and tokenizer. Nothing is compiled yet: see `Policy.warm_up`.

    Args:
        config: from `load_policy_config`.
        checkpoint_dir: a local checkpoint, with `model.safetensors` (PyTorch) or `params/` (JAX).
        backend: `torch`, `jax`, or `auto`: by what the checkpoint holds.
        device: the backend's name of a device; None: an accelerator where there is one.
        precision: `bfloat16` or `float32`.
        prefix_precision: `fp8`: PyTorch's matrices of vision tower and VLM in FP8; None: as `precision` says.
        compile_mode: PyTorch's, e.g. `max-autotune`; not compiled when None. JAX always compiles.
        num_steps: flow steps of a request that names none.
        default_prompt: goes before the configuration's.
        max_batch_size: most requests in a model call.
        real_time_chunking: take requests that continue a chunk, too.
        tokenizer: a sentencepiece model; None: the configuration's, else PaliGemma's, fetched when it is not cached.
        compilation_cache: where JAX keeps compiled programs; None: below `data_home` where that is given, and for a CPU
            nowhere.
        data_home: the cache of the tokenizer; see `resolve`.

    Raises:
        CheckpointError: weights, statistics or tokenizer are missing or do not fit.
        PolicyConfigError: an option is unknown, or its backend is not installed.
        DownloadError: PaliGemma's tokenizer could not be fetched.
    """
    if backend not in BACKENDS:
        raise PolicyConfigError(f"backend: {backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
    checkpoint = detect(checkpoint_dir, layout=None if backend == "auto" else Layout(backend))
    # What is cheap to get wrong is read before the weights, which take minutes.
    stats = find_norm_stats(config, checkpoint.root)
    prompt_tokenizer = PromptTokenizer(tokenizer or config.tokenizer or resolve(TOKENIZER_URI, data_home=data_home))
    options = {"device": device, "precision": precision, "num_steps": num_steps}
    own_options: dict[Layout, dict[str, Any]] = {
        Layout.TORCH: {"prefix_precision": prefix_precision, "compile_mode": compile_mode},
        Layout.JAX: {"compilation_cache": compilation_cache, "data_home": data_home},
    }
    if prefix_precision is not None and checkpoint.layout is not Layout.TORCH:
        raise PolicyConfigError("prefix_precision: fp8 is PyTorch's; the JAX backend has none")
    model = _load_backend(config, checkpoint, options | own_options[checkpoint.layout])
    return Policy(
        config,
        model,
        prompt_tokenizer,
        stats,
        default_prompt=default_prompt,
        num_steps=num_steps,
        max_batch_size=max_batch_size,
        real_time_chunking=real_time_chunking,
    )


def find_norm_stats(config: PolicyConfig, checkpoint_root: Path) -> dict[str, NormStats] | None:
    """Statistics of a configuration in a checkpoint; None where it does not normalise.

    openpi keeps them in the checkpoint; its PyTorch converter may have left them one directory up.

    Raises:
        CheckpointError: they are not there, or malformed; it names the paths that were tried.
    """
    if config.normalization is Normalization.NONE:
        return None
    if config.norm_stats is not None:
        tried = [config.norm_stats]
    else:
        below = Path("assets") / str(config.asset_id) / "norm_stats.json"
        tried = [checkpoint_root / below, checkpoint_root.resolve().parent / below]
    for path in tried:
        if path.is_file():
            return load_norm_stats(path)
    raise CheckpointError(f"{config.name}: no normalisation statistics; tried {' and '.join(map(str, tried))}")


def _load_backend(config: PolicyConfig, checkpoint: Checkpoint, options: dict[str, Any]) -> Backend:
    name = checkpoint.layout.value
    try:
        module = importlib.import_module(f"openpi_flash_models.{name}.backend")
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise PolicyConfigError(
            f"{checkpoint.root} needs the {name} backend, which is not installed: pip install 'openpi-flash[{name}]'"
        ) from error
    if checkpoint.layout is Layout.TORCH:
        import torch

        usual = "cuda" if torch.cuda.is_available() else "cpu"
        options = {**options, "device": options["device"] or usual}
    with contextlib.closing(checkpoint.open()) as source:
        backend: Backend = module.load(config.model, source, **options)
    return backend
