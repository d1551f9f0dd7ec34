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
