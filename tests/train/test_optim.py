"""The learning rate at the corners of a run, and what is clipped."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from easylm_like.errors import UserError
from easylm_like.train.config import OptimConfig, Schedule
from easylm_like.train.optim import make_optimizer, make_schedule


def rates(config: OptimConfig, steps: int) -> list[float]:
    schedule = make_schedule(config, steps)
    return [float(schedule(step)) for step in range(steps + 1)]


def test_the_first_step_learns_and_the_warm_up_ends_at_the_peak() -> None:
    got = rates(OptimConfig(learning_rate=0.8, warmup_steps=4, schedule=Schedule.CONSTANT), 10)
    assert got == pytest.approx([0.2, 0.4, 0.6] + [0.8] * 8)


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("schedule", Schedule)
def test_without_a_warm_up_the_first_step_has_the_peak(schedule: Schedule, warmup: int) -> None:
    assert rates(OptimConfig(learning_rate=0.8, warmup_steps=warmup, schedule=schedule), 10)[0] == pytest.approx(0.8)


def test_linear_and_cosine_go_from_the_peak_to_the_final_rate() -> None:
    config = OptimConfig(learning_rate=1.0, final_learning_rate=0.2, warmup_steps=2, schedule=Schedule.LINEAR)
    assert rates(config, 10)[1:] == pytest.approx([1.0, *(1.0 - 0.1 * i for i in range(9))])
    config.schedule = Schedule.COSINE
    assert rates(config, 10)[2:] == pytest.approx([0.6 + 0.4 * math.cos(math.pi * i / 8) for i in range(9)])


@pytest.mark.parametrize(
    ("schedule", "published"),
    [(Schedule.LINEAR, get_linear_schedule_with_warmup), (Schedule.COSINE, get_cosine_schedule_with_warmup)],
)
def test_the_rates_are_those_of_transformers_but_for_its_idle_first_step(
    schedule: Schedule, published: Callable[..., LRScheduler]
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, theirs = published(optimizer, num_warmup_steps=3, num_training_steps=12), []
    for _ in range(12):
        theirs += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert theirs[0] == 0.0
    ours = rates(OptimConfig(learning_rate=0.5, warmup_steps=3, schedule=schedule), 12)
    assert ours[:3] == pytest.approx(theirs[1:4])
    assert ours[3:12] == pytest.approx(theirs[3:])


@pytest.mark.parametrize("warmup", [-1, 11])
def test_a_warm_up_must_fit_the_run(warmup: int) -> None:
    with pytest.raises(UserError, match=rf"warmup_steps {warmup} must lie between 0 and the run's 10 steps"):
        make_schedule(OptimConfig(warmup_steps=warmup), 10)


def test_a_warm_up_may_be_the_whole_run() -> None:
    assert rates(OptimConfig(learning_rate=1.0, warmup_steps=4), 4)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_a_rate_of_zero_changes_nothing() -> None:
    config = OptimConfig(learning_rate=0.0, weight_decay=0.5)
    optimizer = make_optimizer(config, make_schedule(config, 5))
    weights = {"q": jnp.ones(3)}
    updates, _ = optimizer.update({"q": jnp.ones(3)}, optimizer.init(weights), weights)
    np.testing.assert_array_equal(updates["q"], np.zeros(3))
