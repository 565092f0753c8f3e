"""The proof, on this machine with this config, that a run that is killed is the run that is not.

WORKDIR/unbroken/, killed/   the two runs, and what they printed in unbroken.log and killed.log
        certificate.json     their digests, if they are equal
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easylm_like.atomic import atomic_file
from easylm_like.errors import UserError
from easylm_like.train.config import RunConfig

POLL = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Trial:
    """`arguments` are those of every run but its --workdir."""

    folder: Path
    arguments: list[str]
    kills: int
    seed: int


def certify(config: RunConfig, argv: Sequence[str], flags: dict[str, str]) -> None:
    """Run `config` (that of `argv`) twice in WORKDIR, once with kills, compare, and write the certificate.

    Raises:
        UserError: a flag is no number, a run failed, or the two differ.
    """
    numbers = {name: flags[name] for name in ("steps", "kills", "seed")}
    if not all(value.isdigit() for value in numbers.values()):
        raise UserError(f"--steps, --kills and --seed must be whole numbers, got {numbers}")
    steps = int(flags["steps"]) or config.steps
    folder = Path(flags["workdir"])
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; verify-resume makes two runs there: give it a new --workdir")
    folder.mkdir(parents=True, exist_ok=True)
    trial = Trial(folder, [*_of_config(argv), *_short(config, steps)], int(flags["kills"]), int(flags["seed"]))
    print(f"{steps} steps without a break in {folder}/unbroken", flush=True)
    began, first = time.monotonic(), 0.0
    process = _start(trial, "unbroken")
    while process.poll() is None:
        if not first and (folder / "unbroken" / "metrics.jsonl").exists():
            first = time.monotonic() - began
        time.sleep(POLL)
    _expect_success(trial, "unbroken", process.returncode)
    kills = _run_with_kills(trial, first, time.monotonic() - began - first)
    wanted, got = (_fingerprint(trial, name) for name in ("unbroken", "killed"))
    if different := [name for name in wanted if wanted[name] != got[name]]:
        raise UserError(
            f"{folder}: the run that was killed is another one: {', '.join(map(_naming(wanted, got), different))}"
        )
    with atomic_file(folder / "certificate.json") as path:
        certificate = {"equal": True, "command": trial.arguments, "kills": kills, "both runs": wanted}
        path.write_text(json.dumps(certificate, indent=2) + "\n")
    print(
        f"equal to the bit after {len(kills)} kills: {len(wanted['params'])} weights, {len(wanted['optimizer'])} "
        f"arrays of the optimizer, the PRNG key, the next batches and all losses. {folder}/certificate.json"
    )


def _of_config(argv: Sequence[str]) -> list[str]:
    """Return the arguments that make the config: --config=FILE and --config.x=y, or with their value after a space."""
    kept: list[str] = []
    for argument, before in zip(argv, ["", *argv], strict=False):
        follows = not argument.startswith("-") and before.startswith("--config") and "=" not in before
        if argument.startswith("--config") or follows:
            kept.append(argument)
    return kept


def _short(config: RunConfig, steps: int) -> list[str]:
    """Return what makes the run `steps` long: a schedule that fits, and some checkpoints to be killed between."""
    warmup = min(config.optim.warmup_steps, steps // 2)
    decay = min(config.optim.decay_steps, steps - warmup)
    every = config.checkpoint_every
    return [
        f"--config.steps={steps}",
        f"--config.optim.warmup_steps={warmup}",
        f"--config.optim.decay_steps={decay}",
        f"--config.checkpoint_every={every if 0 < every <= steps // 2 else max(steps // 4, 1)}",
        "--config.milestone_every=0",
        "--config.log_every=1",
        "--config.profile.steps=()",
    ]


def _run_with_kills(trial: Trial, first: float, rest: float) -> list[dict[str, Any]]:
    """Run with SIGKILLs, each between the start and one share of the run's time later; return when they were."""
    moments, kills = random.Random(trial.seed), list[dict[str, Any]]()
    while len(kills) < trial.kills:
        process, after = _start(trial, "killed"), moments.uniform(first / 2, first + rest / trial.kills)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills.append(
                {"after_seconds": round(after, 2), "then_saved": _saved(trial.folder / "killed" / "checkpoints")}
            )
            print(
                f"kill {len(kills)} of {trial.kills} after {after:.1f} s; saved: {kills[-1]['then_saved']}", flush=True
            )
        else:
            _expect_success(trial, "killed", process.returncode)
            break  # it was faster than the unbroken one: there is nothing left to kill
    _expect_success(trial, "killed", _start(trial, "killed").wait())
    return kills


def _saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.name.isdigit())


def _start(trial: Trial, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "easylm_like.train", *trial.arguments, f"--workdir={trial.folder / name}"]
    with (trial.folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _expect_success(trial: Trial, name: str, status: int) -> None:
    if status:
        lines = (trial.folder / f"{name}.log").read_text().splitlines() or [""]
        raise UserError(f"{trial.folder / name}: the run ended with status {status}: {lines[-1]}")


def _fingerprint(trial: Trial, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "easylm_like.train", "fingerprint", *trial.arguments]
    done = subprocess.run([*command, f"--workdir={trial.folder / name}"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{trial.folder / name}: {(done.stderr.splitlines() or ['no fingerprint'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _naming(wanted: dict[str, Any], got: dict[str, Any]) -> Any:
    def name(part: str) -> str:
        if not isinstance(wanted[part], dict):
            return part
        inner = [key for key in wanted[part].keys() | got[part].keys() if wanted[part].get(key) != got[part].get(key)]
        return f"{part} ({', '.join(sorted(inner)[:3])}{', ...' * (len(inner) > 3)})"

    return name
