"""Saving while the training goes on, and which checkpoints stay."""

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

from easylm_like.errors import UserError
from easylm_like.train.checkpoint import (
    FULL_DISK,
    RunInfo,
    begin_save,
    finish_save,
    new_checkpointer,
    read_run_info,
    remove_step,
    remove_unfinished,
    saved_steps,
    why_not,
)
from easylm_like.train.config import RunConfig
from easylm_like.train.hosts import on_every_host
from easylm_like.train.state import TrainState

HELDOUT = "heldout_loss"  # in run.json, if it was measured


class Saver:
    """Writes states in the background, one at a time, and deletes checkpoints that need not stay, never the newest.

    Used with `with`, which waits for the last one also when the run fails.
    """

    def __init__(self, folder: Path, config: RunConfig, run: RunInfo) -> None:
        self._folder, self._config, self._run = folder, config, run
        self._main = jax.process_index() == 0
        self._checkpointer, self._thread = new_checkpointer(), ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: tuple[int, Future[None]] | None = None
        self._quiet = _quiet_orbax()
        if self._main:
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder)

    def __enter__(self) -> Self:
        self._quiet.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self._pending and kind is not None and not issubclass(kind, UserError):
                self._end(*self._pending)  # this host alone may be ending: there is nobody to meet
            else:
                self.wait()
        finally:
            self._thread.shutdown()
            self._quiet.__exit__(None, None, None)

    def save(self, state: TrainState, heldout_loss: float | None = None) -> None:
        """Begin to save a state under its step number; it may be changed as soon as this returns.

        Raises:
            UserError: it or the one before it could not be written.
        """
        self.wait()
        step, run = int(state.step), dict(self._run)
        if heldout_loss is not None:
            run[HELDOUT] = heldout_loss
        try:
            begin_save(self._checkpointer, self._folder, state)
        except Exception as error:  # whatever a disk makes tensorstore and Orbax raise
            raise self._failure(step, error) from error
        self._pending = step, self._thread.submit(self._finish, step, run)

    def check(self) -> None:
        """Raise a UserError if the save in the background has failed; of several hosts' run the next save tells.

        They would find out after different steps, and some would wait for the others in the one after.
        """
        if jax.process_count() == 1 and self._pending and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in the background, then delete what need not stay.

        Raises:
            UserError: it could not be written.
        """
        if self._pending is None:
            return
        (step, pending), self._pending = self._pending, None
        # Together: a host that ended before the first one has written the digests would end that one too.
        on_every_host(partial(self._end, step, pending))

    def _end(self, step: int, pending: Future[None]) -> None:
        try:
            pending.result()
        except Exception as error:  # as in save
            raise self._failure(step, error) from error
        if self._main:
            losses = {step: _heldout_loss(self._folder, step) for step in saved_steps(self._folder)}
            for unwanted in losses.keys() - steps_to_keep(losses, self._config):
                remove_step(self._folder, unwanted)

    def _finish(self, step: int, run: RunInfo) -> None:
        self._checkpointer.wait_until_finished()
        if self._main:
            finish_save(self._folder, step, run)

    def _failure(self, step: int, error: Exception) -> UserError:
        self._give_up()
        what = why_not(error)
        kept = saved_steps(self._folder)
        return UserError(
            f"{self._folder}: the checkpoint of step {step} could not be written: {what}. "
            + (f"Those of steps {kept} are whole" if kept else "There is none before it")
            + f"; {'make room' if what == FULL_DISK else 'mend that'} and start the run again"
            + (": it goes on from the newest" if kept else "")
        )

    def _give_up(self) -> None:
        """Forget the save that has failed and delete its files, so that the next one can succeed."""
        self._checkpointer = new_checkpointer()  # the old one may have kept more errors, and would raise them there
        for _ in range(50 * self._main):  # writes that Orbax no longer waits for may make files meanwhile, and after
            with suppress(OSError):
                if not remove_unfinished(self._folder):
                    break
            time.sleep(0.1)


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keep from the terminal that a write which Orbax gave up, because another has failed, came to its end."""

    def unless_closed(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    before, sys.unraisablehook = sys.unraisablehook, unless_closed
    try:
        yield
    finally:
        sys.unraisablehook = before


def steps_to_keep(losses: Mapping[int, float | None], config: RunConfig) -> set[int]:
    """Return which of the saved steps stay, by their held-out losses: the last, the best, and the milestones."""
    measured = [(loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    milestones = {step for step in losses if config.milestone_every and step % config.milestone_every == 0}
    return (
        milestones
        | {*sorted(losses)[-config.keep_checkpoints :]}
        | {s for _, s in sorted(measured)[: config.keep_best]}
    )


def _heldout_loss(folder: str | os.PathLike[str], step: int) -> float | None:
    try:
        loss = read_run_info(folder, step)[1].get(HELDOUT)
    except UserError:  # a damaged one
        return None
    return loss if isinstance(loss, float) else None
