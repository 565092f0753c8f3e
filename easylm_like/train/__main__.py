"""Train a model on conversations.

python -m easylm_like.train --config=configs/koala_tiny.py --workdir=runs/koala_tiny [--config.optim.learning_rate=1e-4]
"""

import sys
from pathlib import Path

from easylm_like.command import run_command
from easylm_like.config_file import read_flags
from easylm_like.train.config import RunConfig


def main(argv: list[str]) -> None:
    """Read the flags, then train."""
    config, flags = read_flags(argv, RunConfig, {"workdir": "where checkpoints, logs and tokens go"})
    from easylm_like.train.loop import train  # after the flags: a typo should not wait for jax

    train(config, Path(flags["workdir"]))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
