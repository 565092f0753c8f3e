"""The state before the first step: the same on every mesh, laid out as it was announced, no two layers alike."""

import jax
import numpy as np
import optax
import pytest

from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import Params
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.train.config import OptimConfig
from easylm_like.train.optim import make_optimizer
from easylm_like.train.state import abstract_state, init_state

ADAMW = make_optimizer(OptimConfig(), optax.constant_schedule(0.1))
ONE, MANY = MeshConfig(), MeshConfig(fsdp=4, tensor=2)


def test_a_seed_gives_the_same_weights_on_every_mesh(shape: LlamaConfig) -> None:
    one = init_state(shape, ADAMW, make_mesh(ONE, jax.devices()[:1]), seed=3)
    many = init_state(shape, ADAMW, make_mesh(MANY), seed=3)
    jax.tree.map(np.testing.assert_array_equal, one, many)
    assert int(many.step) == 0


def test_seeds_and_layers_differ(shape: LlamaConfig) -> None:
    first, second = (init_state(shape, ADAMW, make_mesh(MANY), seed=seed).params for seed in (3, 4))
    for name in ("embed", "q", "k", "v", "o", "gate", "up", "down", "head"):
        assert not np.any(np.asarray(first[name]) == np.asarray(second[name])), name
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        assert not np.any(np.asarray(first[name][0]) == np.asarray(first[name][1])), name
    assert not np.any(np.asarray(first["gate"]) == np.asarray(first["up"]))


@pytest.mark.parametrize("given", [False, True])
def test_the_state_lies_as_announced(shape: LlamaConfig, params: Params, given: bool) -> None:
    mesh = make_mesh(MANY)
    like = abstract_state(shape, ADAMW, mesh)
    if given:
        params = {name: jax.device_put(weight, like.params[name].sharding) for name, weight in params.items()}
    state = init_state(shape, ADAMW, mesh, seed=0, params=params if given else None)

    def same(announced: jax.ShapeDtypeStruct, array: jax.Array) -> None:
        assert (array.shape, array.dtype, array.sharding) == (announced.shape, announced.dtype, announced.sharding)

    jax.tree.map(same, like, state)
    if given:
        jax.tree.map(np.testing.assert_array_equal, state.params, params)
