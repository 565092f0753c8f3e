"""The proof, on this machine with this config, that a run that is killed is the run that is not.

WORKDIR/unbroken/, killed/   the two runs, and what they printed in unbroken.log and killed.log
        certificate.json     what was run, when it was killed, and the digests of both, if they are equal

The kills are SIGKILLs, spread over the run and by turns in the midst of steps, of a save, and of what comes before the
first step of a start (imports, data, restoring, compiling); each a random time after that has begun.
"""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from easylm_like.atomic import atomic_file
from easylm_like.errors import UserError
from easylm_like.train.checkpoint import saved_steps
from easylm_like.train.config import RunConfig

POLL = 0.005  # seconds; the save of a tiny model takes some hundredths
TRAIN = (sys.executable, "-m", "easylm_like.train")
STEP_LINE = re.compile(rb"^step +(\d+)/", re.MULTILINE)


class Moment(StrEnum):
    """What a run is about when it is killed."""

    STEPS = "taking steps"
    SAVE = "saving"
    START = "before its first step"


@dataclass(frozen=True, slots=True)
class ShortRun:
    """A command that takes `steps` steps, but for its --workdir; `train` is how the trainer is called."""

    arguments: list[str]
    steps: int
    train: tuple[str, ...] = TRAIN


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that the unbroken run took to its first step, for a step, and for a save."""

    start: float
    step: float
    save: float


@dataclass(frozen=True, slots=True)
class Kill:
    """When a run was killed, and what it left: the last step that it told, whole checkpoints and unfinished ones."""

    moment: Moment
    after_seconds: float  # of this start
    told_step: int
    saved: list[int]
    unfinished: list[str]


def short_run(config: RunConfig, argv: Sequence[str], steps: int) -> ShortRun:
    """Return the run of `argv`, whose config is `config`, in `steps` steps: a schedule that fits, and four saves."""
    if steps < 1:
        raise UserError(f"--steps must be at least 1, or 0 for all of config.steps, got {steps}")
    warmup = min(config.optim.warmup_steps, steps // 2)
    changes = {
        "steps": steps,
        "optim.warmup_steps": warmup,
        "optim.decay_steps": min(config.optim.decay_steps, steps - warmup),
        "checkpoint_every": min(config.checkpoint_every or steps, max(steps // 4, 1)),
        "milestone_every": 0,
        "log_every": 1,
        "log.wandb_project": "",
        "profile.steps": (),
    }
    return ShortRun([*_of_config(argv), *(f"--config.{name}={value}" for name, value in changes.items())], steps)


def certify(folder: Path, run: ShortRun, kills: int, seed: int) -> None:
    """Run twice in `folder`, once with `kills` SIGKILLs, compare, and write the certificate.

    Raises:
        UserError: there is something in the folder, a run failed or was over before a kill, or the two differ.
    """
    if kills < 1:
        raise UserError(f"--kills must be at least 1, got {kills}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; verify-resume makes two runs there: give it a new --workdir")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{run.steps} steps without a break in {folder}/unbroken", flush=True)
    pace = _run_unbroken(folder, run)
    print(
        f"{pace.start:.1f} s to the first step, {pace.step:.3f} s each, {pace.save:.2f} s for a save; the same with "
        f"{kills} kills in {folder}/killed",
        flush=True,
    )
    killed = _run_with_kills(folder, run, pace, kills, random.Random(seed))
    wanted, got = (_fingerprint(folder, run, name) for name in ("unbroken", "killed"))
    if different := differences(wanted, got):
        raise UserError(
            f"{folder}: the run that was killed is another one, see unbroken/ and killed/ there. "
            f"Not equal: {', '.join(different)}"
        )
    certificate = {
        "equal": True,
        "command": [*run.train, *run.arguments],
        "seed": seed,
        "kills": [asdict(kill) for kill in killed],
        "both runs": wanted,
    }
    with atomic_file(folder / "certificate.json") as path:
        path.write_text(json.dumps(certificate, indent=2) + "\n")
    print(
        f"equal to the bit after {len(killed)} kills: {len(wanted['params'])} weights, {len(wanted['optimizer'])} "
        f"arrays of the optimizer, the PRNG key, the next batches, {len(wanted['losses'])} losses. "
        f"{folder}/certificate.json"
    )


def differences(wanted: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """Return what differs between two fingerprints, each with its first three arrays or steps."""
    told = []
    for part in wanted:
        if isinstance(wanted[part], dict):
            keys = dict.fromkeys((*wanted[part], *got[part]))  # in the order of the run
            inner = [key for key in keys if wanted[part].get(key) != got[part].get(key)]
            if inner:
                told.append(f"{part} ({', '.join(inner[:3])}{', ...' * (len(inner) > 3)}: {len(inner)} of {len(keys)})")
        elif wanted[part] != got[part]:
            told.append(part)
    return told


def _of_config(argv: Sequence[str]) -> list[str]:
    """Return the arguments that make the config: --config=FILE and --config.x=y, or with their value after a space."""
    kept: list[str] = []
    for argument, before in zip(argv, ["", *argv], strict=False):
        follows = not argument.startswith("-") and before.startswith(("--config", "-config")) and "=" not in before
        if argument.startswith(("--config", "-config")) or follows:
            kept.append(argument)
    return kept


@dataclass(frozen=True, slots=True)
class _Child:
    """A run in a process of its own. Its log goes on where that of its last start ended, at the byte `since`."""

    process: subprocess.Popen[bytes]
    workdir: Path
    began: float
    since: int

    def look(self) -> "_Seen":
        """Return what can be seen of it from outside."""
        with _log_of(self.workdir).open("rb") as log:
            log.seek(self.since)
            told = STEP_LINE.findall(log.read())
        unfinished = sorted(path.name for path in (self.workdir / "checkpoints").glob("*.partial*"))
        return _Seen(time.monotonic() - self.began, int(told[-1]) if told else 0, unfinished)

    def watch(self) -> Iterator["_Seen"]:
        """Look at it again and again until it ends."""
        while self.process.poll() is None:
            yield self.look()
            time.sleep(POLL)


class _Seen(NamedTuple):
    """Seconds since a start, the last step that was told since, and the folders of unfinished saves."""

    seconds: float
    told: int
    unfinished: list[str]


@contextmanager
def _started(folder: Path, run: ShortRun, name: str) -> Iterator[_Child]:
    """Start the run FOLDER/NAME; it is killed at the end of the `with` if it has not ended by itself."""
    workdir = folder / name
    with _log_of(workdir).open("ab") as log:
        since, began = log.tell(), time.monotonic()
        command = [*run.train, *run.arguments, f"--workdir={workdir}"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield _Child(process, workdir, began, since)
    finally:
        process.kill()
        process.wait()


def _log_of(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.log")


def _expect_success(child: _Child) -> None:
    if status := child.process.wait():
        lines = _log_of(child.workdir).read_text().splitlines() or [""]
        raise UserError(f"{child.workdir}: the run ended with status {status}: {lines[-1]}")


def _run_unbroken(folder: Path, run: ShortRun) -> Pace:
    first, saving, saves, before = 0.0, 0.0, 0, _Seen(0.0, 0, [])
    with _started(folder, run, "unbroken") as child:
        for seen in child.watch():
            first = first or (seen.seconds if seen.told else 0.0)
            saving += seen.seconds - before.seconds if seen.unfinished else 0.0
            saves += bool(seen.unfinished) and not before.unfinished
            before = seen
        _expect_success(child)
    return Pace(first or before.seconds, (before.seconds - first) / run.steps, saving / max(saves, 1))


def _run_with_kills(folder: Path, run: ShortRun, pace: Pace, kills: int, chance: random.Random) -> list[Kill]:
    """Kill the run in each of as many equal shares of its steps, then let it end; return the kills that met it."""
    done, lasts = list[Kill](), {Moment.STEPS: pace.step, Moment.SAVE: pace.save, Moment.START: pace.start}
    for number in range(kills):
        moment = list(Moment)[number % len(Moment)]
        step = 1 + int(chance.uniform(number, number + 1) / kills * (run.steps - 1))
        kill = _kill(folder, run, (moment, step), delay=chance.uniform(0, lasts[moment]))
        if kill is None:
            print(f"the run was over before kill {number + 1} of {kills} ({moment.value})", flush=True)
            break
        done.append(kill)
        left = f", unfinished {' '.join(kill.unfinished)}" if kill.unfinished else ""
        print(
            f"kill {number + 1} of {kills} {moment.value}, {kill.after_seconds} s after its start, the last step it "
            f"told: {kill.told_step or 'none'}; saved {kill.saved or 'none'}{left}",
            flush=True,
        )
    with _started(folder, run, "killed") as child:
        _expect_success(child)
    if not done:
        raise UserError(f"{folder / 'killed'}: the run was over before it could be killed; give it more --steps")
    return done


def _kill(folder: Path, run: ShortRun, when: tuple[Moment, int], delay: float) -> Kill | None:
    """Start the run and kill it `delay` seconds after a moment has begun, from a step on; None if it was over."""
    moment, step = when
    with _started(folder, run, "killed") as child:
        for seen in child.watch():
            # A start deletes what a kill left unfinished before it takes a step; what is there after one is its own.
            saving = seen.told and seen.unfinished
            if moment == Moment.START or (seen.told >= step and (moment == Moment.STEPS or saving)):
                time.sleep(delay)
                break
    if child.process.returncode != -signal.SIGKILL:
        _expect_success(child)
        return None
    seen = child.look()
    return Kill(moment, round(seen.seconds, 2), seen.told, saved_steps(child.workdir / "checkpoints"), seen.unfinished)


def _fingerprint(folder: Path, run: ShortRun, name: str) -> dict[str, Any]:
    command = [*run.train, "fingerprint", *run.arguments, f"--workdir={folder / name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{folder / name}: {(done.stderr.splitlines() or ['no fingerprint'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
