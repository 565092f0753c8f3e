"""Where a run's numbers go beside metrics.jsonl: TensorBoard, Weights & Biases, and profiler traces.

The two packages are the extra `track`; neither is imported unless the config asks for it.
"""

import importlib
import importlib.util
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import jax

from easylm_like.errors import UserError
from easylm_like.train.config import LogConfig


class Tracker(Protocol):
    """Takes numbers by name, "train/loss" or "heldout/hh/bad", as a line of metrics.jsonl has them."""

    def scalars(self, step: int, when: float, values: Mapping[str, float]) -> None:
        """Take the numbers of a step; `when` is in seconds since 1970."""

    def close(self, failed: bool) -> None:
        """Write what is still held back."""


def check_trackers(config: LogConfig) -> None:
    """Raise a UserError if a package that `config` needs is not installed."""
    wanted = [
        ("tensorboard", config.tensorboard, "tensorboard"),
        ("wandb", config.wandb_project != "", "wandb_project"),
    ]
    for package, asked, name in wanted:
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(
                f"config.log.{name} needs the package {package}, which is not installed; "
                f"pip install {package}, or leave config.log.{name} out"
            )


def open_trackers(
    config: LogConfig, workdir: Path, run: Mapping[str, object], history: Sequence[Mapping[str, Any]]
) -> list[Tracker]:
    """Return what `config` asks for; `run` is what config.json holds, `history` are the lines of metrics.jsonl.

    Raises:
        UserError: Weights & Biases cannot be reached or nobody is logged in.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(workdir / "tensorboard", history))
    if config.wandb_project:
        # Without a line that is kept this is another run than the one whose id may lie there.
        trackers.append(WeightsAndBiases(config.wandb_project, workdir, run, goes_on=bool(history)))
    return trackers


def names(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl by "kind/name"."""
    return {f"{line['kind']}/{name}": value for name, value in line.items() if name not in ("step", "kind", "time")}


class TensorBoard:
    """One event file, which a run that goes on makes anew out of metrics.jsonl: no step is in it twice.

    Written with the `tensorboard` package's own records and messages. Its EventFileWriter would do more, but it imports
    all of TensorFlow where that is installed (through tensorboard.compat.tf), and TensorFlow takes the GPU's memory.
    """

    def __init__(self, folder: Path, history: Iterable[Mapping[str, Any]]) -> None:
        record_writer = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        folder.mkdir(parents=True, exist_ok=True)
        old = list(folder.glob("events.out.tfevents.*"))
        path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"  # its beginning makes it one
        self._records = record_writer.RecordWriter(path.open("wb"))
        self._records.write(self._event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for line in history:
            self._write(line["step"], line.get("time", 0.0), names(line))  # older runs kept no time
        self._records.flush()
        for path in old:
            path.unlink()

    def scalars(self, step: int, when: float, values: Mapping[str, float]) -> None:
        """Append the numbers; a TensorBoard that is looking sees them at once."""
        self._write(step, when, values)
        self._records.flush()

    def close(self, failed: bool) -> None:
        """Close the file."""
        self._records.close()

    def _write(self, step: int, when: float, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = self._event(wall_time=when, step=step, summary=self._summary(value=scalars))
        self._records.write(event.SerializeToString())


class WeightsAndBiases:
    """A run of a project there; its id is kept in WORKDIR/wandb/run_id, so that a run that goes on is the same one.

    Steps that are run again after a kill are not sent again where the server has them: they are the same numbers.
    Where it sends (WANDB_MODE, WANDB_API_KEY) is wandb's own business.
    """

    def __init__(self, project: str, workdir: Path, run: Mapping[str, object], *, goes_on: bool) -> None:
        wandb = importlib.import_module("wandb")
        kept = workdir / "wandb" / "run_id"
        kept.parent.mkdir(parents=True, exist_ok=True)
        known = kept.read_text().strip() if goes_on and kept.is_file() else None
        try:
            self._run = wandb.init(
                project=project, dir=workdir, id=known, resume="allow", config=dict(run), allow_val_change=True
            )
        except wandb.Error as error:
            raise UserError(
                f"config.log.wandb_project={project}: {error}; run `wandb login`, or set WANDB_MODE=offline and send "
                "the run later with `wandb sync`"
            ) from error
        kept.write_text(self._run.id + "\n")

    def scalars(self, step: int, when: float, values: Mapping[str, float]) -> None:
        """Send the numbers, unless a later step was sent before."""
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """Send the rest, and how it ended."""
        self._run.finish(exit_code=int(failed))


class Profiler:
    """Traces steps `steps[0]`, ..., `steps[1] - 1` into a folder for TensorBoard (its xprof) or Perfetto.

    Used with `with`, so that a run that fails leaves no trace open. A run that goes on after some of them traces the
    rest.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...], say: Callable[[str], None]) -> None:
        self._folder, self._steps, self._say = folder, range(*steps) if steps else range(0), say
        self._tracing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._tracing:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Begin to trace if `step` is the first of them that is run."""
        if step in self._steps and not self._tracing:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._tracing = True

    def after(self, step: int, result: object) -> float:
        """End the trace after the last of them, when its result is there; return the seconds that writing it took."""
        if not self._tracing or step + 1 < self._steps.stop:
            return 0.0
        jax.block_until_ready(result)
        began = time.perf_counter()
        jax.profiler.stop_trace()
        self._tracing = False
        self._say(f"the profile of the steps up to {step} is in {self._folder}")
        return time.perf_counter() - began
