"""Compiled programs kept on disk."""

import os
from pathlib import Path

import jax

from jtl.errors import ConfigError


def keep_compiled(directory: str | Path) -> Path:
    """Keep compiled programs in a folder, so that the next process that needs one reads it instead of compiling.

    A program is found again by its own text, the versions of jax and of the device's driver and the options of the
    compiler. Off until it is called; it holds for the process. On CPU a program belongs to the kind of processor that
    compiled it: do not share the folder between machines.

    Args:
      directory: made where it is absent.

    Returns:
      The folder.

    Raises:
      ConfigError: it cannot be written to.
    """
    folder = Path(directory).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} cannot be written to")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default jax keeps only what took longer than a second, which leaves out most of a small model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
