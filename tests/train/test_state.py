"""The state before the first step: the same on every mesh, laid out as it was announced, no two layers alike."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from easylm_like.model.config import Compute, LlamaConfig
from easylm_like.model.llama import Params
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.train.config import OptimConfig, Optimizer
from easylm_like.train.optim import make_optimizer, update_params
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


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", Optimizer)
def test_moments_of_a_weights_shape_lie_as_the_weight_and_the_rest_everywhere(
    shape: LlamaConfig, optimizer: Optimizer, moments: str
) -> None:
    narrow = replace(shape, compute=Compute(param_dtype="bfloat16"), qkv_bias=True)
    config = OptimConfig(optimizer=optimizer, moment_dtype=moments)
    state = abstract_state(narrow, make_optimizer(config, optax.constant_schedule(0.1)), make_mesh(MANY))
    spread = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        assert leaf.dtype == (moments if leaf.ndim else "int32"), path
        name = next((name for name in state.params if f"'{name}'" in str(path[-1])), None)
        if name and leaf.shape == state.params[name].shape:
            assert leaf.sharding == state.params[name].sharding
            spread += not leaf.sharding.is_fully_replicated
        else:
            assert leaf.sharding.is_fully_replicated
    weights = {name: weight for name, weight in state.params.items() if not weight.sharding.is_fully_replicated}
    moments_of = {Optimizer.ADAMW: 2 * len(weights), Optimizer.LION: len(weights), Optimizer.MUON: len(weights) + 8}
    # Muon: a second moment of embedding, head, three norms and three biases. Adafactor: the last six alone, unfactored.
    assert spread == moments_of.get(optimizer, 6)


@pytest.mark.parametrize("optimizer", Optimizer)
def test_an_update_on_many_devices_is_that_on_one(shape: LlamaConfig, params: Params, optimizer: Optimizer) -> None:
    config = OptimConfig(optimizer=optimizer, learning_rate=0.01, weight_decay=0.1, clip_norm=0.5)
    made = make_optimizer(config, optax.constant_schedule(0.01))
    random = np.random.default_rng(0)
    gradient = {name: random.normal(0, 0.1, weight.shape).astype(np.float32) for name, weight in params.items()}

    def update(mesh: Mesh) -> tuple[Params, optax.OptState]:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(shape, made, mesh))
        state = init_state(shape, made, mesh, 0, jax.device_put(params, shardings.params))
        step = jax.jit(partial(update_params, made), out_shardings=(shardings.params, shardings.opt_state))
        with jax.set_mesh(mesh):
            return step(jax.device_put(gradient, shardings.params), state.opt_state, state.params, jax.random.key(0))

    one, many = update(make_mesh(ONE, jax.devices()[:1])), update(make_mesh(MANY))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-5), one, many)
    assert not np.array_equal(one[0]["q"], params["q"])


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
