"""What a step changes: the step number, the weights, the optimizer's state; and how they come to lie on a mesh."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import Params, abstract_model, init_params, param_shardings


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[])
@dataclass(frozen=True, slots=True)
class TrainState:
    """`step` int32 counts the updates made; randomness and data of the next one derive from it."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def abstract_state(config: LlamaConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the state's shapes and dtypes with their shardings, for a restore or a compile; takes no memory.

    An array of the optimizer that is kept under a weight's name in a dict and has its shape lies as the weight does.
    Counts and what is smaller, such as Adafactor's means over rows and columns, lie on every device.
    """
    _, shapes, _ = abstract_model(config)
    shardings = param_shardings(config, mesh)
    params: Any = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[n]) for n, s in shapes.items()}
    replicated = NamedSharding(mesh, PartitionSpec())
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)

    def place(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        like = next((params[key.key] for key in reversed(path) if isinstance(key, DictKey) and key.key in params), None)
        sharding = like.sharding if like is not None and like.shape == leaf.shape else replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
    return TrainState(step, params, opt_state)


def init_state(
    config: LlamaConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, params: Params | None = None
) -> TrainState:
    """Return the state before step 0, made where it will lie: random weights from `seed`, or the given ones."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))
    if params is None:
        params = jax.jit(partial(init_params, config), out_shardings=shardings.params)(jax.random.key(seed))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=shardings.step)(), params, opt_state)
