"""Compiled programs, kept from one start of a process to the next."""

import logging
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from openpi_flash_models.errors import PolicyConfigError

FOLDER = "compiled/jax"
"""Below `data_home`."""

Options = dict[str, str | bool | int]
"""Of XLA, by name."""

GPU_OPTIONS: Options = {}
"""What programs for a GPU are compiled with, where the XLA that is installed knows it."""

logger = logging.getLogger(__name__)


def keep_programs(device: jax.Device, directory: Path | None, data_home: Path | None) -> None:
    """Has JAX write every program that this process compiles to disk, and read it from there where it already is.

    Args:
        device: for which is compiled.
        directory: where to. None: below `data_home`, but not for a CPU: what is compiled there holds the instructions
            of that very CPU, and a cache may be shared with other machines.
        data_home: the cache of downloads; None as well: nothing is kept.

    Raises:
        PolicyConfigError: `directory` cannot be written to. Where it was not asked for, that is a warning.
    """
    chosen = directory
    if chosen is None and data_home is not None and device.platform != "cpu":
        chosen = data_home / FOLDER
    if chosen is None:
        return
    try:
        chosen.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if directory is not None:
            raise PolicyConfigError(f"compilation cache: cannot make {chosen}: {error.strerror}") from error
        logger.warning("compiled programs are not kept: cannot make %s: %s", chosen, error.strerror)
        return
    compilation_cache.reset_cache()  # it may have been opened elsewhere
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    # Small programs, too: a service is not ready before the last of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def known_options(device: jax.Device, wanted: Options | None = None) -> Options:
    """Those of some options of XLA that it takes, found out by trying: versions differ, and an unknown one is an error.

    Args:
        device: for which is compiled.
        wanted: the options; None: `GPU_OPTIONS` where it is a GPU.
    """
    if wanted is None:
        wanted = GPU_OPTIONS if device.platform == "gpu" else {}
    known: Options = {}
    for name, value in wanted.items():
        try:
            with jax.default_device(device):
                jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(0.0).compile()
        except Exception as error:  # whatever it is, there is a way without
            logger.warning("XLA does not take the option %s=%s: %s", name, value, error)
        else:
            known[name] = value
    return known
