"""Steps that are not taken, because their batch makes the loss or the gradient jump.

As OLMo-core's SkipStepOptimizer and Levanter's skip_bad_steps do, with 6 standard deviations over 128 steps in both.
What is otherwise here:

- A spike enters the history as the limit it went beyond, so that one does not hide the next. In theirs one gradient
  1000 times too large lets everything below 500 times through for the next 128 steps. A lasting change of level is
  accepted all the same: of 10 standard deviations after about 5 steps, of 100 after 23, of 1000 after 42.
- A fall is no spike. OLMo's rule skips one too, such as that of the loss at the start of a second epoch.
- A loss or norm that is no finite number is no spike but the end of the run. Theirs skip it, and then every step until
  it has left the history.
- The history is part of the checkpoint, and the learning rate that of the step, however many were skipped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

HISTORY = 128  # steps; with fewer than half of them nothing is skipped
LEAST_DEVIATION = 1e-4  # of the mean: a history without any deviation would never accept another level


class SpikeState(NamedTuple):
    """`recent` fp32 [2, HISTORY]: loss and gradient norm of the last steps, a ring; int32 counts; the optimizer's."""

    recent: jax.Array
    seen: jax.Array
    skipped: jax.Array
    inner: optax.OptState


def skip_spikes(optimizer: optax.GradientTransformation, sigmas: float) -> optax.GradientTransformationExtraArgs:
    """Return `optimizer`, whose update wants `loss` too and is zero for a spike; then its moments stay as they were.

    Its counts go on, so that the learning rate stays that of the step.
    """

    def init(params: optax.Params) -> SpikeState:
        zero = jnp.zeros((), jnp.int32)
        return SpikeState(jnp.zeros((2, HISTORY), jnp.float32), zero, zero, optimizer.init(params))

    def update(
        updates: optax.Updates, state: SpikeState, params: optax.Params | None = None, *, loss: jax.Array, **_: Any
    ) -> tuple[optax.Updates, SpikeState]:
        now = jnp.stack([loss, optax.tree.norm(updates)]).astype(jnp.float32)
        limits = _limits(state, sigmas)
        spike = jnp.any(now > limits) & jnp.all(jnp.isfinite(now))
        new_updates, new = optimizer.update(updates, state.inner, params)
        new_updates = jax.tree.map(lambda u: jnp.where(spike, 0, u), new_updates)
        inner = jax.tree.map(
            lambda old, new: jnp.where(spike, old, new) if jnp.issubdtype(new.dtype, jnp.floating) else new,
            state.inner,
            new,
        )
        recent = state.recent.at[:, state.seen % HISTORY].set(jnp.minimum(now, limits))
        return new_updates, SpikeState(recent, state.seen + 1, state.skipped + spike, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def skipped_steps(opt_state: optax.OptState) -> jax.Array | None:
    """Return how many steps were not taken, int32; None if every one is."""
    return opt_state.skipped if isinstance(opt_state, SpikeState) else None


def _limits(state: SpikeState, sigmas: float) -> jax.Array:
    """Return fp32 [2]: mean + sigmas * standard deviation of the steps seen, infinite before there are enough."""
    known = jnp.arange(HISTORY) < state.seen
    count = jnp.maximum(jnp.sum(known), 2)
    mean = jnp.sum(jnp.where(known, state.recent, 0), axis=1, keepdims=True) / count
    variance = jnp.sum(jnp.where(known, (state.recent - mean) ** 2, 0), axis=1) / (count - 1)
    deviation = jnp.maximum(jnp.sqrt(variance), LEAST_DEVIATION * mean[:, 0])
    return jnp.where(state.seen < HISTORY // 2, jnp.inf, mean[:, 0] + sigmas * deviation)
