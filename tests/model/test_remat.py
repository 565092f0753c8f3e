"""Remat: the same gradients whatever is saved, each policy computes twice what it says, and memory shrinks in order."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from easylm_like.model.config import Attention, Compute, LlamaConfig, Remat
from easylm_like.model.llama import Params, abstract_model

SHAPE = LlamaConfig(vocab_size=64, d_model=16, d_ff=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, max_length=64)
B, T = 2, 24


def gradient(config: LlamaConfig, batch: int = B, length: int = T) -> Callable[[Params], Params]:
    """Return the function that gives the gradient of a number that every output enters, with noise if there is any."""
    graphdef = abstract_model(config)[0]
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, config.vocab_size, (batch, length)))
    weights = jnp.asarray(random.normal(size=(1, length, config.d_model)), jnp.float32)
    places = jnp.ones((batch, length), jnp.int32), jnp.broadcast_to(jnp.arange(length), (batch, length))
    noise_B = jax.random.split(jax.random.key(1), batch)

    def total(params: Params) -> jax.Array:
        x_BTD, _ = nnx.merge(graphdef, params)(tokens, places, noise_B=noise_B)
        return jnp.sum(x_BTD * weights)

    return jax.grad(total)


@pytest.fixture(scope="module")
def params() -> Params:
    random = np.random.default_rng(0)
    shapes = abstract_model(SHAPE)[1].items()
    return {
        name: jnp.asarray(random.normal(name.endswith("norm"), 0.25, like.shape), "float32") for name, like in shapes
    }


@pytest.fixture(scope="module")
def wanted(params: Params) -> Params:
    """Return the gradients of the plainest computation: scanned, all saved, all scores."""
    return jax.jit(gradient(replace(SHAPE, compute=Compute(dropout=0.1, forget=0.3))))(params)


@pytest.mark.parametrize("remat", Remat)
@pytest.mark.parametrize(("scan", "attention"), [(True, Attention.CHUNKED), (False, Attention.XLA)])
def test_gradients_do_not_depend_on_what_is_saved(
    params: Params, wanted: Params, remat: Remat, scan: bool, attention: Attention
) -> None:
    compute = Compute(dropout=0.1, forget=0.3, remat=remat, scan_layers=scan, attention=attention)
    got = jax.jit(gradient(replace(SHAPE, compute=compute)))(params)
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, atol=1e-6 * np.abs(array).max(), rtol=1e-5, err_msg=name)


def matmuls(function: Callable[..., object], *arguments: object) -> int:
    """Return how many matmuls are written in the jaxpr: those in the body of a loop once."""

    def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
        for equation in jaxpr.eqns:
            yield equation
            for leaf in jax.tree.leaves(equation.params, is_leaf=lambda value: isinstance(value, Jaxpr | ClosedJaxpr)):
                if isinstance(leaf, Jaxpr | ClosedJaxpr):
                    yield from equations(leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf)

    made = equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    return sum(equation.primitive.name == "dot_general" for equation in made)


# A layer has 7 projections: q, k, v, o, gate, up, down. The last is never needed twice.
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    ("attention", "remat", "twice"),
    [
        (Attention.CHUNKED, Remat.MATMULS, 0),
        (Attention.CHUNKED, Remat.ATTENTION, 6),
        (Attention.CHUNKED, Remat.INPUTS, 6 + 2),
        (Attention.XLA, Remat.MATMULS, 1),  # the scores: no one would keep them
        (Attention.XLA, Remat.ATTENTION, 6 + 1),
        (Attention.XLA, Remat.INPUTS, 6 + 2),
    ],
)
def test_a_policy_computes_twice_what_it_says(
    params: Params, scan: bool, attention: Attention, remat: Remat, twice: int
) -> None:
    def counted(remat: Remat) -> int:
        return matmuls(
            gradient(replace(SHAPE, compute=Compute(remat=remat, attention=attention, scan_layers=scan))), params
        )

    assert counted(Remat.ALL) == (1 if scan else 2) * (7 * 3 + (6 if attention == Attention.XLA else 7))
    assert counted(remat) - counted(Remat.ALL) == (1 if scan else 2) * twice


def test_memory_shrinks_from_policy_to_policy() -> None:
    config = replace(SHAPE, d_model=64, d_ff=192, n_layers=8, n_heads=4, n_kv_heads=4, head_dim=16)
    batch, length = 8, 128
    kept = 4 * config.n_layers * batch * length  # bytes of one fp32 number per token and layer

    def bytes_of(remat: Remat) -> int:
        compute = Compute(remat=remat, attention=Attention.CHUNKED)
        step = jax.jit(gradient(replace(config, compute=compute), batch, length))
        memory = step.lower(abstract_model(config)[1]).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    everything, matmuls, attention, inputs = map(bytes_of, (Remat.ALL, Remat.MATMULS, Remat.ATTENTION, Remat.INPUTS))
    assert everything > matmuls > attention > inputs
    # Beyond a layer's input: q, k, v, the result of attention with its logsumexps, and of o, gate and up.
    assert matmuls - inputs == pytest.approx(kept * (3 * 64 + 64 + 4 + 64 + 2 * 192), rel=0.1)
    assert attention - inputs == pytest.approx(kept * (64 + 4), rel=0.1)
