"""Which checkpoints stay, and what becomes of a save when the run or the save itself fails."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from easylm_like.errors import UserError
from easylm_like.train.checkpoint import read_run_info, restore_state, saved_steps, step_damage
from easylm_like.train.config import RunConfig
from easylm_like.train.saver import Saver, steps_to_keep
from easylm_like.train.state import TrainState

NAN, INF = float("nan"), float("inf")


def state(step: int) -> TrainState:
    weights = {"a": jax.device_put(np.full((4, 6), step, np.float32))}
    return TrainState(jax.device_put(np.int32(step)), weights, (weights,))


@pytest.mark.parametrize(
    ("losses", "last", "best", "every", "wanted"),
    [
        ({}, 2, 1, 10, set()),
        ({10: None}, 2, 1, 0, {10}),
        ({10: None, 20: None, 30: None}, 2, 1, 0, {20, 30}),
        ({5: 1.0, 10: 2.0, 15: 3.0, 20: 4.0}, 1, 0, 0, {20}),
        ({5: 1.0, 10: 2.0, 15: 3.0, 20: 4.0}, 1, 1, 0, {5, 20}),
        ({5: 1.0, 10: 2.0, 15: 3.0, 20: 4.0}, 1, 2, 0, {5, 10, 20}),
        ({5: 1.0, 10: 2.0, 15: 3.0, 20: 4.0}, 1, 0, 10, {10, 20}),
        ({5: 9.0, 10: 9.0, 15: 8.0, 20: 9.0}, 1, 1, 10, {10, 15, 20}),
        ({5: 4.0, 10: 3.0, 15: 2.0, 20: 1.0}, 1, 1, 0, {20}),  # the best is the last one
        ({5: 1.0, 10: 1.0, 15: 1.0, 20: 2.0}, 1, 1, 0, {5, 20}),  # of equals the first
        ({5: NAN, 10: -INF, 15: 3.0, 20: None}, 1, 1, 0, {15, 20}),  # no number is the best
        ({5: None, 100: None, 20: None}, 2, 0, 0, {20, 100}),  # steps are numbers, in whatever order
    ],
)
def test_the_last_the_best_and_the_milestones_stay(
    losses: dict[int, float | None], last: int, best: int, every: int, wanted: set[int]
) -> None:
    assert steps_to_keep(losses, RunConfig(keep_checkpoints=last, keep_best=best, milestone_every=every)) == wanted


def test_what_stays_after_every_save_is_what_would_stay_of_all() -> None:
    # Deleting after each save must not lose what a look back from the end would keep.
    draw = random.Random(0)
    for _ in range(300):
        config = RunConfig(
            keep_checkpoints=draw.randint(1, 3), keep_best=draw.randint(0, 3), milestone_every=draw.choice([0, 6])
        )
        losses = {step: draw.choice([None, NAN, draw.randint(0, 5) / 2]) for step in range(2, 40, 2)}
        left = dict[int, float | None]()
        for step, loss in losses.items():
            left[step] = loss
            left = {kept: left[kept] for kept in steps_to_keep(left, config)}
            assert step in left
        assert left.keys() == steps_to_keep(losses, config)
        numbers = sorted(loss for loss in losses.values() if loss is not None and loss == loss)
        of_left = sorted(loss for loss in left.values() if loss is not None and loss == loss)
        assert of_left[: config.keep_best] == numbers[: config.keep_best]


def test_files_stay_by_the_losses_that_they_hold_also_after_a_restart(tmp_path: Path) -> None:
    config = RunConfig(keep_checkpoints=1, keep_best=1, milestone_every=4)
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5, 5: 3.5, 6: None, 7: 2.0, 8: NAN, 9: 9.0}
    found = dict[int, list[int]]()
    for step, loss in losses.items():
        with Saver(tmp_path, config, {"number": 1}) as saver:
            saver.save(state(step), loss)
        found[step] = saved_steps(tmp_path)
    assert found == {
        1: [1],
        2: [2],
        3: [2, 3],
        4: [2, 4],
        5: [2, 4, 5],
        6: [2, 4, 6],
        7: [4, 7],
        8: [4, 7, 8],
        9: [4, 7, 8, 9],
    }
    assert read_run_info(tmp_path, 7) == (7, {"number": 1, "heldout_loss": 2.0})
    assert read_run_info(tmp_path, 4) == (4, {"number": 1, "heldout_loss": 4.5})
    for step in found[9]:
        jax.tree.map(np.testing.assert_array_equal, restore_state(tmp_path, step, state(step)), state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "7", "8", "9"]


@pytest.mark.parametrize("error", [RuntimeError("of the run"), KeyboardInterrupt()])
def test_a_run_that_fails_ends_with_its_last_save_whole(tmp_path: Path, error: BaseException) -> None:
    def run() -> None:
        with Saver(tmp_path, RunConfig(keep_checkpoints=1), {}) as saver:
            saver.save(state(1))
            saver.save(state(2))
            raise error

    with pytest.raises(type(error)):
        run()
    assert saved_steps(tmp_path) == [2]
    assert step_damage(tmp_path, 2) == []


def poll(saver: Saver) -> None:
    for _ in range(600):
        saver.check()
        time.sleep(0.05)


@pytest.mark.parametrize(
    "notice", [poll, Saver.wait, lambda saver: saver.save(state(3))], ids=["check", "wait", "save"]
)
def test_a_save_that_failed_is_an_error_once_and_leaves_nothing(
    tmp_path: Path, notice: Callable[[Saver], None]
) -> None:
    with Saver(tmp_path, RunConfig(), {}) as saver:
        saver.save(state(1))
    with Saver(tmp_path, RunConfig(), {"not JSON": {1}}) as saver:
        saver.save(state(2))
        says = (
            r": the checkpoint of step 2 could not be written: .*not JSON serializable\. Those of steps \[1\] are "
            "whole; mend that and start the run again: it goes on from the newest$"
        )
        with pytest.raises(UserError, match=says):
            notice(saver)
        saver.check()
        saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_the_error_of_the_first_save_of_all_says_that_there_is_none(tmp_path: Path) -> None:
    says = r"There is none before it; mend that and start the run again$"
    with pytest.raises(UserError, match=says), Saver(tmp_path, RunConfig(), {"not JSON": {1}}) as saver:
        saver.save(state(1))
    assert list(tmp_path.iterdir()) == []
