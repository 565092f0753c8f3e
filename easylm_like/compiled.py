"""Programs that XLA compiled, kept on the disk for the next process."""

import os

import jax


def keep_compiled(folder: str, platform: str) -> None:
    """Keep what XLA compiles from now on in `folder`, for the next run on this machine; "" keeps nothing.

    Not on CPUs: a program compiled for one may end the process on another that shares the folder, and jaxlib 0.10
    takes some for another machine's on the machine that made them (github.com/jax-ml/jax/issues/38445).
    """
    if folder and platform != "cpu":
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)  # what compiles faster is not worth a file
