"""One update, as a pure function of (state, batch), and the loss of one batch without an update."""

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from easylm_like.data.loader import Batch
from easylm_like.model.llama import GraphDef, Params
from easylm_like.model.partition import batch_part, constrain, partition_spec
from easylm_like.train.loss import LossTerms, token_nll, weighted_loss
from easylm_like.train.optim import update_params
from easylm_like.train.spikes import skipped_steps
from easylm_like.train.state import TrainState

Metrics = dict[str, jax.Array]
Rows = TypeVar("Rows", Batch, np.ndarray)
NoisyBatch = tuple[Sequence[jax.Array], jax.Array]  # the batch, and a PRNG key for every row


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: GraphDef,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    z_loss: float = 0.0,
    seed: int = 0,
) -> tuple[TrainState, Metrics]:
    """Return the next state and fp32 scalars: loss, grad_norm (before clipping), trained_tokens, tokens.

    Also skipped, the steps that were not taken so far, if the optimizer skips spikes.

    The gradient is that of sum(weights * (nll + z-loss)) / sum(weights) over the global batch, whatever `micro_batches`
    and the mesh. `loss` is nll alone. Noise (dropout, forgotten tokens, the
    rounding of bfloat16 weights) is drawn from `seed` and the step; a row's does not depend on its micro-batch.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    noise_key, rounding_key = jax.random.split(key)
    rows = jnp.arange(batch.tokens.shape[0])
    parts = (list(map(jnp.asarray, batch)), jax.vmap(partial(jax.random.fold_in, noise_key))(rows))
    trained = jnp.sum(batch.weights)
    share = 1 / jnp.maximum(trained, 1)  # of a token in the loss: known before, so that no gradient is divided after
    loss_sum = jax.value_and_grad(partial(_weighted_loss, graphdef, z_loss, share), has_aux=True)
    if micro_batches == 1:
        (_, nll), gradient = loss_sum(state.params, parts)
    else:
        split = jax.tree.map(lambda leaf: _split(leaf, micro_batches), parts)
        zero = (jnp.zeros((), jnp.float32), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params))

        def add(total: tuple[jax.Array, Params], part: NoisyBatch) -> tuple[tuple[jax.Array, Params], None]:
            (_, nll), gradient = loss_sum(state.params, part)
            return jax.tree.map(jnp.add, total, (nll, gradient)), None

        (nll, gradient), _ = jax.lax.scan(add, zero, split)
    gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
    params, opt_state = update_params(optimizer, gradient, state.opt_state, state.params, rounding_key, nll * share)
    metrics = {
        "loss": nll * share,
        "grad_norm": optax.tree.norm(gradient),
        "trained_tokens": trained,
        "tokens": jnp.sum(batch.segments > 0).astype(jnp.float32),
    }
    if (skipped := skipped_steps(opt_state)) is not None:
        metrics["skipped"] = skipped.astype(jnp.float32)
    return TrainState(state.step + 1, params, opt_state), metrics


def group_loss(
    params: Params, batch: Batch, groups: jax.Array | np.ndarray, *, graphdef: GraphDef, n_groups: int
) -> tuple[jax.Array, jax.Array]:
    """Return fp32 sums of weights * nll and of weights, [n_groups] each; `groups` int32 [B, T] names each group."""
    model = nnx.merge(graphdef, params)
    tokens_BT, targets_BT, weights_BT, segments_BT, positions_BT = map(jnp.asarray, batch)
    x_BTD, _ = model(tokens_BT, (segments_BT, positions_BT))
    nll_BT = token_nll(x_BTD, model.head_VD(), targets_BT, weights_BT, model.config.vocab_size)
    zeros = jnp.zeros(n_groups, jnp.float32)
    return zeros.at[groups].add(weights_BT * nll_BT), zeros.at[groups].add(weights_BT)


def to_devices(mesh: Mesh, local: Rows, batch_size: int) -> Rows:
    """Make global arrays [B, T], cut over the mesh by (batch, length), out of the rows that this host's devices hold.

    `local` has the rows of `batch_part(mesh, batch_size)`, in that order, and is whole in length.
    """
    sharding, first = NamedSharding(mesh, partition_spec(("batch", "length"))), batch_part(mesh, batch_size).start

    def place(leaf: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # this host holds all that it is asked for
            start, stop, _ = index[0].indices(batch_size)
            return leaf[start - first : stop - first, index[1]]

        return jax.make_array_from_callback((batch_size, leaf.shape[1]), sharding, part)

    return jax.tree.map(place, local)


def _weighted_loss(
    graphdef: GraphDef, z_loss: float, share: jax.Array, params: Params, part: NoisyBatch
) -> tuple[jax.Array, jax.Array]:
    """Return what this part adds to the loss of the whole batch, to be differentiated, and its sum(weights * nll)."""
    (tokens_BT, targets_BT, weights_BT, segments_BT, positions_BT), noise_B = part
    model = nnx.merge(graphdef, params)
    compute = model.config.compute
    noisy = compute.dropout or compute.forget
    x_BTD, _ = model(tokens_BT, (segments_BT, positions_BT), noise_B=noise_B if noisy else None)
    terms = LossTerms(vocab_size=model.config.vocab_size, z_loss=z_loss)
    loss, nll = weighted_loss(x_BTD, model.head_VD(), targets_BT, weights_BT, terms)
    return loss * share, nll


def _split(leaf: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...], every part over all devices: rows m, m + parts, ... make part m."""
    split = jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)
    return constrain(split, "layers", "batch", *("length",) * (leaf.ndim - 1))
