"""One update, as a pure function of (state, batch), and the loss of one batch without an update."""

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
from easylm_like.model.partition import constrain, partition_spec
from easylm_like.train.loss import token_nll
from easylm_like.train.state import TrainState

Metrics = dict[str, jax.Array]
Rows = TypeVar("Rows", Batch, np.ndarray)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    micro_batches: int = 1,
) -> tuple[TrainState, Metrics]:
    """Return the next state and fp32 scalars: loss, grad_norm (before clipping), learning_rate, trained_tokens, tokens.

    The gradient is that of sum(weights * nll) / sum(weights) over the global batch, whatever `micro_batches` and the
    mesh: sums are accumulated and divided once.
    """
    loss_sum = jax.value_and_grad(partial(_weighted_nll, graphdef))
    if micro_batches == 1:
        nll, gradient = loss_sum(state.params, batch)
    else:
        parts = jax.tree.map(lambda leaf: _split(leaf, micro_batches), batch)
        zero = (jnp.zeros((), jnp.float32), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params))
        (nll, gradient), _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, loss_sum(state.params, part)), None), zero, parts
        )
    trained = jnp.sum(batch.weights)
    gradient = jax.tree.map(lambda g, p: (g / jnp.maximum(trained, 1)).astype(p.dtype), gradient, state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    metrics = {
        "loss": nll / jnp.maximum(trained, 1),
        "grad_norm": optax.tree.norm(gradient),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "trained_tokens": trained,
        "tokens": jnp.sum(batch.segments > 0).astype(jnp.float32),
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def group_loss(
    params: Params, batch: Batch, groups: jax.Array | np.ndarray, *, graphdef: GraphDef, n_groups: int
) -> tuple[jax.Array, jax.Array]:
    """Return fp32 sums of weights * nll and of weights, [n_groups] each; `groups` int32 [B, T] names each group."""
    nll_BT = _nll(graphdef, params, batch)
    zeros = jnp.zeros(n_groups, jnp.float32)
    return zeros.at[groups].add(batch.weights * nll_BT), zeros.at[groups].add(batch.weights)


def to_devices(mesh: Mesh, local: Rows) -> Rows:
    """Make global arrays [B, T], cut over the mesh by (batch, length), out of every host's own rows."""
    sharding = NamedSharding(mesh, partition_spec(("batch", "length")))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), local)


def _weighted_nll(graphdef: GraphDef, params: Params, batch: Batch) -> jax.Array:
    return jnp.sum(batch.weights * _nll(graphdef, params, batch))


def _nll(graphdef: GraphDef, params: Params, batch: Batch) -> jax.Array:
    model = nnx.merge(graphdef, params)
    tokens_BT, targets_BT, _, segments_BT, positions_BT = map(jnp.asarray, batch)
    x_BTD, _ = model(tokens_BT, (segments_BT, positions_BT))
    return token_nll(x_BTD, model.head_VD(), targets_BT)


def _split(leaf_BT: jax.Array, parts: int) -> jax.Array:
    """[B, T] -> [parts, B / parts, T], every part spread over all devices: rows m, m + parts, ... make part m."""
    split = jnp.moveaxis(leaf_BT.reshape(-1, parts, *leaf_BT.shape[1:]), 1, 0)
    return constrain(split, "layers", "batch", "length")
