"""A run on eight devices, however they are arranged, is the run on one device."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import pytest

from easylm_like.data.loader import Batch
from easylm_like.model.config import Attention, Compute, LlamaConfig
from easylm_like.model.llama import Params, abstract_model
from easylm_like.model.partition import MESH_AXES, MeshConfig, make_mesh
from easylm_like.train.config import OptimConfig
from easylm_like.train.optim import make_optimizer, make_schedule
from easylm_like.train.state import TrainState, abstract_state, init_state
from easylm_like.train.step import to_devices, train_step

STEPS = 3
OPTIM = OptimConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.1, eps=1e-4)  # eps: signs of 1e-9 are noise


@dataclass(frozen=True)
class Run:
    losses: list[float]
    state: TrainState


def run_steps(shape: LlamaConfig, params: Params, batch: Batch, sizes: tuple[int, ...], micro_batches: int = 1) -> Run:
    """Take a few steps, each on the rows in another order, on a mesh of these sizes."""
    config = MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True)))
    mesh = make_mesh(config, jax.devices()[: int(np.prod(sizes))])
    schedule = make_schedule(OPTIM, STEPS)
    optimizer = make_optimizer(OPTIM, schedule)
    step = partial(train_step, graphdef=abstract_model(shape)[0], optimizer=optimizer)
    step, losses = jax.jit(partial(step, micro_batches=micro_batches)), []
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(shape, optimizer, mesh).params)
        state = init_state(shape, optimizer, mesh, 0, jax.device_put(params, shardings))
        for number in range(STEPS):
            rows = np.random.default_rng(number).permutation(len(batch.tokens))[:4].repeat(2)
            state, metrics = step(state, to_devices(mesh, Batch(*(array[rows] for array in batch)), len(rows)))
            losses.append(float(metrics["loss"]))
    return Run(losses, state)


@pytest.fixture(scope="module")
def alone(shape: LlamaConfig, params: Params, batch: Batch) -> Run:
    noisy = replace(shape, compute=Compute(dropout=0.1, forget=0.3))
    return run_steps(noisy, params, batch, (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        (((1, 8, 1, 1), 1, Attention.CHUNKED), {"q": (2, 2, 4, 4), "down": (2, 24, 2)}),
        (((1, 4, 1, 2), 2, Attention.CHUNKED), {"q": (2, 4, 2, 4), "down": (2, 12, 4)}),
        (((2, 2, 1, 2), 1, Attention.XLA), {"q": (2, 8, 2, 4), "down": (2, 12, 8)}),
        (((1, 4, 2, 1), 1, Attention.XLA), {"q": (2, 4, 4, 4), "down": (2, 24, 4)}),
        (((1, 4, 2, 1), 1, Attention.CHUNKED), {"q": (2, 4, 4, 4), "down": (2, 24, 4)}),
        (((2, 2, 2, 1), 2, Attention.CHUNKED), {"q": (2, 8, 4, 4), "down": (2, 24, 8)}),
    ],
    ids=[
        "fsdp-8",
        "fsdp-4-tensor-2-micro-2",
        "replica-2-fsdp-2-tensor-2",
        "fsdp-4-sequence-2-xla",
        "fsdp-4-sequence-2",
        "replica-2-fsdp-2-sequence-2-micro-2",
    ],
)
def test_every_mesh_trains_as_one_device(
    shape: LlamaConfig,
    params: Params,
    batch: Batch,
    alone: Run,
    how: tuple[tuple[int, ...], int, Attention],
    parts: dict[str, tuple[int, ...]],
) -> None:
    """With dropout and forgotten tokens, whose masks must not depend on the mesh either."""
    sizes, micro_batches, attention = how
    noisy = replace(shape, compute=Compute(dropout=0.1, forget=0.3, attention=attention))
    run = run_steps(noisy, params, batch, sizes, micro_batches)
    np.testing.assert_allclose(run.losses, alone.losses, atol=1e-5)
    assert alone.losses[0] - alone.losses[-1] > 0.05, "nothing was learnt"
    for name, weight in alone.state.params.items():
        np.testing.assert_allclose(run.state.params[name], weight, atol=1e-5, err_msg=name)
    # Weights and moments lie in parts: L is whole, D is cut by fsdp, N and F by tensor.
    mu = next(part.mu for part in jax.tree.leaves(run.state.opt_state, is_leaf=has_moments) if has_moments(part))
    for weights in (run.state.params, mu):
        for name, part in parts.items():
            assert {shard.data.shape for shard in weights[name].addressable_shards} == {part}


def has_moments(part: object) -> bool:
    return hasattr(part, "mu")
