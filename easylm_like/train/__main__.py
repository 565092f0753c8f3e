"""Train a model on conversations, and look at what a run did.

python -m easylm_like.train --config=configs/koala_tiny.py --workdir=DIR [--config.optim.learning_rate=1e-4]
python -m easylm_like.train at-step 17 --config=... --workdir=DIR      shows the batch of step 17 and its losses
python -m easylm_like.train verify-resume --config=... --workdir=NEW   proves that kills change nothing, on two runs of
    [--steps=40] steps, the second with [--kills=3] SIGKILLs at moments that [--seed=0] chooses

On several hosts the same command on each, with --multihost, or with --coordinator=HOST:PORT --hosts=N --host=I.
Status 0: finished; 75: ended by SIGTERM with its state saved, start it again; 1: an error that stays.
"""

import json
import sys
from pathlib import Path

from easylm_like.command import run_command
from easylm_like.config_file import read_flags
from easylm_like.errors import UserError
from easylm_like.train.config import RunConfig

FLAGS = {"workdir": "where checkpoints, logs and tokens go"}
HOSTS: dict[str, tuple[str | bool | int, str]] = {
    "multihost": (False, "several hosts, which find each other as a TPU pod, Slurm, Open MPI or Kubernetes says"),
    "coordinator": ("", "HOST:PORT of host 0, where nothing says it"),
    "hosts": (0, "how many processes there are, with --coordinator"),
    "host": (-1, "which of them this is, from 0 on, with --coordinator"),
}


def main(argv: list[str]) -> None:
    """Read the flags, then train, or do what the first word says."""
    command, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    if command == "at-step":
        show_step(rest)
    elif command == "verify-resume":
        verify_resume(rest)
    elif command == "fingerprint":  # of verify-resume's runs
        show_fingerprint(rest)
    elif command:
        raise UserError(f"unknown command {command!r}; there are at-step and verify-resume, and none to train")
    else:
        run(rest)


def run(argv: list[str]) -> None:
    """Train; exit with EXIT_SAVED if SIGTERM ended it."""
    config, flags = read_flags(argv, RunConfig, FLAGS, HOSTS)
    from easylm_like.train.loop import train  # after the flags: a typo should not wait for jax
    from easylm_like.train.stop import EXIT_SAVED

    _join(flags)
    if not train(config, Path(flags["workdir"])):
        sys.exit(EXIT_SAVED)


def show_step(argv: list[str]) -> None:
    """Print the batch of a step."""
    if not argv or not argv[0].isdigit():
        raise UserError("expected at-step N --config=... --workdir=..., N as in the log")
    config, flags = read_flags(argv[1:], RunConfig, FLAGS, HOSTS)
    from easylm_like.train.at_step import print_step

    _join(flags)
    print_step(config, Path(flags["workdir"]), int(argv[0]))


def verify_resume(argv: list[str]) -> None:
    """Run the certificate's runs and write it."""
    more: dict[str, tuple[str | bool | int, str]] = {
        "steps": (40, "steps of each run; 0: as many as config.steps"),
        "kills": (3, "how often the second run is killed"),
        "seed": (0, "of the moments of the kills"),
    }
    config, flags = read_flags(argv, RunConfig, FLAGS, more)
    from easylm_like.train.certify import certify, short_run

    steps, kills, seed = (int(flags[name]) for name in ("steps", "kills", "seed"))
    certify(Path(flags["workdir"]), short_run(config, argv, steps or config.steps), kills, seed)


def show_fingerprint(argv: list[str]) -> None:
    """Print a run's digests as one line of JSON."""
    config, flags = read_flags(argv, RunConfig, FLAGS)
    from easylm_like.train.fingerprint import fingerprint

    print(json.dumps(fingerprint(config, Path(flags["workdir"]))))


def _join(flags: dict[str, str]) -> None:
    from easylm_like.train.hosts import join_hosts

    if flags["multihost"] == "True" or flags["coordinator"]:
        join_hosts(flags["coordinator"], int(flags["hosts"]), int(flags["host"]))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
