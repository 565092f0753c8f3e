"""Steps that are skipped: which ones, against NumPy with a plain list; what a skip leaves alone; NaN is none."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easylm_like.data.loader import Batch
from easylm_like.model.config import Compute, LlamaConfig
from easylm_like.model.llama import abstract_model
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.train.checkpoint import restore_state
from easylm_like.train.config import OptimConfig, RunConfig
from easylm_like.train.optim import make_optimizer
from easylm_like.train.saver import Saver
from easylm_like.train.spikes import skip_spikes
from easylm_like.train.state import TrainState, abstract_state, init_state
from easylm_like.train.step import Metrics, to_devices, train_step

# What a step of plain descent with rate 1 takes off the one weight is its gradient; 0 if it is skipped.
DESCENT = skip_spikes(optax.sgd(1.0), 6.0)
Signal = np.ndarray  # [500 steps, 2]: loss and gradient norm
TakeStep = Callable[[float], tuple[TrainState, TrainState, Metrics]]


def signal() -> Signal:
    """Return a loss that falls and a norm that does not, both noisy."""
    random = np.random.default_rng(0)
    loss = 2 + np.exp(-np.arange(500) / 50) + random.normal(0, 0.02, 500)
    return np.stack([loss, random.uniform(0.5, 1.5, 500)], axis=1).astype(np.float32)


def advance(state: optax.OptState, now: jax.Array) -> tuple[optax.OptState, jax.Array]:
    updates, state = DESCENT.update({"w": now[1]}, state, {"w": jnp.float32(0)}, loss=now[0])
    return state, updates["w"] == 0


def ours(values: Signal) -> list[int]:
    """Return the steps that are skipped."""
    state, skipped = jax.lax.scan(advance, DESCENT.init({"w": jnp.float32(0)}), jnp.asarray(values))
    assert (int(state.seen), int(state.skipped)) == (len(values), int(skipped.sum()))
    return np.flatnonzero(skipped).tolist()


def by_hand(values: Signal) -> list[int]:
    """Return them by the rule: six deviations above the mean of the last 128 steps, of at least 64, spikes cut off."""
    histories, skipped = ([], []), []
    for step, now in enumerate(values.astype(np.float64)):
        limits = [np.inf, np.inf]
        if step >= 64:
            recent = [np.array(history[-128:]) for history in histories]
            limits = [h.mean() + 6 * max(h.std(ddof=1), 1e-4 * h.mean()) for h in recent]
        if np.any(now > limits):
            skipped.append(step)
        for history, value, limit in zip(histories, now, limits, strict=True):
            history.append(min(value, limit))
    return skipped


def test_spikes_of_loss_or_norm_are_skipped_and_nothing_else() -> None:
    values = signal()
    values[20] *= 1000  # too early: nothing is known yet
    values[63, 0] *= 50
    values[300, 0] += 1  # the loss alone
    values[350, 1] *= 100  # the norm alone
    values[351, 1] *= 5  # at once the next, a small one
    values[400:402] *= 100
    values[450] /= 100  # a fall is none
    assert ours(values) == by_hand(values) == [300, 350, 351, 400, 401]


@pytest.mark.parametrize(("rise", "most"), [(0.3, 10), (2.0, 25), (50.0, 50)])
def test_a_lasting_change_of_level_is_accepted(rise: float, most: int) -> None:
    values = signal()
    values[300:, 0] += rise
    skipped = ours(values)
    assert skipped == by_hand(values) == list(range(300, 300 + len(skipped)))
    assert 1 < len(skipped) <= most


def test_a_loss_that_never_moved_may_rise_in_the_end() -> None:
    values = np.ones((500, 2), np.float32)
    values[200:] = 2
    skipped = ours(values)
    assert skipped == by_hand(values)
    assert 200 in skipped
    assert 499 not in skipped


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_number_is_not_skipped(wrong: float, which: int) -> None:
    values = signal()
    values[499, which] = wrong
    assert ours(values) == []


def test_after_a_skip_the_learning_rate_is_that_of_the_step() -> None:
    optimizer = skip_spikes(optax.sgd(optax.linear_schedule(1.0, 0.0, 100), momentum=0.9), 6.0)
    values, momentum = signal()[:90], 0.0
    values[80] *= 100
    state, w = optimizer.init({"w": jnp.float32(0)}), {"w": jnp.float32(0)}
    for step, (loss, g) in enumerate(values):
        updates, state = optimizer.update({"w": jnp.float32(g)}, state, w, loss=jnp.float32(loss))
        momentum = momentum if step == 80 else 0.9 * momentum + g
        assert float(updates["w"]) == pytest.approx(-(1 - step / 100) * momentum * (step != 80), rel=1e-4)


@pytest.fixture(scope="module")
def narrow(shape: LlamaConfig) -> LlamaConfig:
    return dataclasses.replace(shape, compute=Compute(param_dtype="bfloat16"))


@pytest.fixture(scope="module")
def optimizer() -> optax.GradientTransformation:
    config = OptimConfig(moment_dtype="bfloat16", skip_spikes=6.0, weight_decay=0.1)
    return make_optimizer(config, optax.constant_schedule(1e-2))


@pytest.fixture(scope="module")
def take_step(narrow: LlamaConfig, optimizer: optax.GradientTransformation, batch: Batch) -> TakeStep:
    """Return a function that takes the step after 100 whose loss was about so much: (state before, after, metrics)."""
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    step = jax.jit(partial(train_step, graphdef=abstract_model(narrow)[0], optimizer=optimizer))
    first = init_state(narrow, optimizer, mesh, seed=0)
    moments = jax.tree.map(lambda m: m + 1 if m.dtype == jnp.bfloat16 else m, first.opt_state.inner)

    def take(loss: float) -> tuple[TrainState, TrainState, Metrics]:
        recent = np.random.default_rng(0).normal([[loss], [1.0]], 0.5, (2, 128)).astype(np.float32)
        recent, seen = jax.device_put((recent, np.int32(100)), first.opt_state.recent.sharding)
        opt_state = first.opt_state._replace(recent=recent, seen=seen, inner=moments)
        before = dataclasses.replace(first, opt_state=opt_state)
        with jax.set_mesh(mesh):
            return before, *step(before, to_devices(mesh, batch, 8))

    return take


@pytest.fixture(scope="module")
def skipped(take_step: TakeStep) -> tuple[TrainState, TrainState, Metrics]:
    """Return a step whose loss is far above those before it."""
    return take_step(0.5)


def unchanged(before: TrainState, after: TrainState) -> set[bool]:
    """Return whether the weights and moments, of 16 bits all, are what they were."""
    old, new = (jax.tree.leaves((state.params, state.opt_state.inner)) for state in (before, after))
    return {np.array_equal(a, b) for a, b in zip(old, new, strict=True) if a.dtype == jnp.bfloat16}


def counts(state: TrainState) -> list[int]:
    """Return what is counted: steps seen, skipped, narrowed, of Adam, of the schedule."""
    return [int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.int32]


def test_a_skipped_step_changes_no_weight_and_no_moment_and_is_counted(
    skipped: tuple[TrainState, TrainState, Metrics],
) -> None:
    before, after, metrics = skipped
    assert metrics["loss"] > 5
    assert unchanged(before, after) == {True}
    assert (int(after.step), float(metrics["skipped"]), counts(after)) == (1, 1.0, [101, 1, 1, 1, 1])


def test_a_step_like_those_before_it_is_taken(take_step: TakeStep) -> None:
    before, after, metrics = take_step(6.0)
    assert unchanged(before, after) == {False}
    assert (int(after.step), float(metrics["skipped"]), counts(after)) == (1, 0.0, [101, 0, 1, 1, 1])


def test_the_history_is_in_the_checkpoint_and_comes_back_on_another_mesh(
    skipped: tuple[TrainState, TrainState, Metrics],
    narrow: LlamaConfig,
    optimizer: optax.GradientTransformation,
    tmp_path: Path,
) -> None:
    _, after, _ = skipped
    with Saver(tmp_path, RunConfig(), {}) as saver:
        saver.save(after)
    like = abstract_state(narrow, optimizer, make_mesh(MeshConfig(), jax.devices()[:1]))
    restored = restore_state(tmp_path, 1, like)
    jax.tree.map(np.testing.assert_array_equal, restored, after)
    assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.sharding), restored) == jax.tree.map(
        lambda leaf: (leaf.dtype, leaf.sharding), like
    )
    assert restored.opt_state.recent[0, 100] > 2, "the limit that the spike went beyond"
