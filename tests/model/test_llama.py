"""One LLaMA: packed, scanned, recomputed, cached and sharded are the same model. test_family.py has the others."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from easylm_like.model.config import Compute, LlamaConfig, Remat
from easylm_like.model.llama import (
    Cache,
    Params,
    Places,
    abstract_model,
    empty_cache,
    init_params,
    param_shardings,
)
from easylm_like.model.partition import MeshConfig, make_mesh

from .conftest import GQA, Packed, Twins

Forward = Callable[..., jax.Array]


@pytest.fixture(scope="module")
def gqa(twins: Callable[[str], Twins]) -> Twins:
    return twins("gqa")


def test_packed_records_have_the_logits_of_each_alone(gqa: Twins, forward: Forward, packed: Packed) -> None:
    got = forward(GQA, gqa.params, packed.tokens, packed.segments, packed.positions)
    assert np.isfinite(got).all()
    for row, where in packed.places:
        with torch.no_grad():
            alone = gqa.theirs(torch.tensor(packed.tokens[row : row + 1, where])).logits[0].numpy()
        np.testing.assert_allclose(got[row, where], alone, atol=1e-4, err_msg=f"{row} {where}")


@partial(jax.jit, static_argnums=0)
def gradients(
    config: LlamaConfig, params: Params, tokens: jax.Array, segments: jax.Array, positions: jax.Array
) -> Params:
    """Return the gradient of a loss over what is no padding, another direction at every token."""

    def loss(params: Params) -> jax.Array:
        model = nnx.merge(abstract_model(config)[0], params)
        x_BTD, _ = model(tokens, (segments, positions))
        nll = -jax.nn.log_softmax(model.logits(x_BTD))
        towards = jnp.take_along_axis(nll, ((tokens * 7 + 3) % config.vocab_size)[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(segments > 0, towards, 0.0))

    return jax.grad(loss)(params)


def test_packed_records_have_the_gradient_of_separate_rows(gqa: Twins, packed: Packed) -> None:
    got = gradients(GQA, gqa.params, packed.tokens, packed.segments, packed.positions)
    tokens, segments, positions = (np.zeros((2, 4, 24), np.int32) for _ in range(3))
    for i, (row, where) in enumerate(packed.places):
        at, length = divmod(i, 4), where.stop - where.start
        tokens[at][:length], segments[at][:length] = packed.tokens[row, where], 1
        positions[at][:length] = np.arange(length)
    halves = [gradients(GQA, gqa.params, *rows) for rows in zip(tokens, segments, positions, strict=True)]
    wanted = {name: halves[0][name] + halves[1][name] for name in got}
    for name, gradient in wanted.items():
        assert np.isfinite(got[name]).all(), name
        assert np.abs(gradient).max() > 1e-3, name
        np.testing.assert_allclose(got[name], gradient, atol=1e-4, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(("scan", "remat"), [(False, Remat.ALL), (True, Remat.INPUTS), (False, Remat.INPUTS)])
def test_scanned_unrolled_and_recomputed_are_one_model(
    gqa: Twins, forward: Forward, packed: Packed, scan: bool, remat: Remat
) -> None:
    rows = (packed.tokens, packed.segments, packed.positions)
    other = replace(GQA, compute=Compute(scan_layers=scan, remat=remat))
    np.testing.assert_allclose(forward(other, gqa.params, *rows), forward(GQA, gqa.params, *rows), atol=1e-5)
    wanted = gradients(GQA, gqa.params, *rows)
    for name, gradient in gradients(other, gqa.params, *rows).items():
        np.testing.assert_allclose(gradient, wanted[name], atol=1e-5, rtol=1e-4, err_msg=name)


def test_bfloat16_computes_nearly_the_same_and_leaves_logits_in_float32(
    gqa: Twins, forward: Forward, packed: Packed
) -> None:
    rows = (packed.tokens, packed.segments, packed.positions)
    got = forward(replace(GQA, compute=Compute(dtype="bfloat16")), gqa.params, *rows)
    wanted = np.asarray(forward(GQA, gqa.params, *rows))
    real = packed.segments > 0
    assert got.dtype == jnp.float32
    error = np.abs(got - wanted)[real]
    assert 1e-4 < error.mean() < 0.1 * wanted[real].std()


def test_a_cache_filled_in_pieces_gives_the_logits_of_the_whole(gqa: Twins, forward: Forward, packed: Packed) -> None:
    tokens = packed.tokens[2:3]
    ones, positions = np.ones((1, 24), np.int32), np.arange(24, dtype=np.int32)[None]
    wanted = forward(GQA, gqa.params, tokens, ones, positions)

    @jax.jit
    def advance(params: Params, tokens: jax.Array, places: Places, cache: Cache) -> tuple[jax.Array, Cache | None]:
        model = nnx.merge(abstract_model(GQA)[0], params)
        x_BTD, cache = model(tokens, places, cache)
        return model.logits(x_BTD), cache

    cache, parts = empty_cache(GQA, 1, 30), []
    for at in (0, 8, 16):
        piece = slice(at, at + 8)
        logits, cache = advance(gqa.params, tokens[:, piece], (ones[:, piece], positions[:, piece]), cache)
        parts.append(logits)
    assert int(cache.used) == 24
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 2, "sequence": 2}], ids=["fsdp tensor", "all but tensor"]
)
def test_a_sharded_model_has_the_logits_of_one_device(
    gqa: Twins, forward: Forward, packed: Packed, sizes: dict[str, int]
) -> None:
    rows = (packed.tokens, packed.segments, packed.positions)
    wanted = forward(GQA, gqa.params, *rows)
    mesh = make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
        shardings = param_shardings(GQA, mesh)
        params = {name: jax.device_put(weight, shardings[name]) for name, weight in gqa.params.items()}
        got = forward(GQA, params, *rows)
    assert len(params["q"].addressable_shards) == 8
    np.testing.assert_allclose(got, wanted, atol=1e-5)


WIDE = replace(GQA, d_model=64, d_ff=128, n_layers=4, head_dim=16)
init = jax.jit(init_params, static_argnums=0)


def test_initial_weights_have_the_declared_spread_and_no_two_layers_are_alike() -> None:
    params = init(WIDE, jax.random.key(0))
    stds = dict.fromkeys(("embed", "q", "k", "v", "gate", "up", "head"), 64**-0.5)
    stds |= {"o": 64**-0.5 * 8**-0.5, "down": 128**-0.5 * 8**-0.5}  # the ends of residual branches, by 1 / sqrt(2 L)
    assert params.keys() == stds.keys() | {"attention_norm", "mlp_norm", "final_norm"}
    for name, weight in params.items():
        if name not in stds:
            assert (weight == 1).all(), name
            continue
        assert float(weight.std()) == pytest.approx(stds[name], rel=0.05), name
        assert abs(float(weight.mean())) < 0.1 * stds[name], name
        if name not in ("embed", "head"):
            layers = np.asarray(weight).reshape(4, -1)
            assert np.abs(np.corrcoef(layers) - np.eye(4)).max() < 0.2, name
    assert abs(np.corrcoef(params["q"].ravel()[:4096], params["o"].ravel()[:4096])[0, 1]) < 0.1


def test_initial_weights_are_a_function_of_the_key() -> None:
    one, again, other = init(WIDE, jax.random.key(1)), init(WIDE, jax.random.key(1)), init(WIDE, jax.random.key(2))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["q"], other["q"])


def test_weights_have_the_dtype_of_the_config_and_a_tied_model_no_head() -> None:
    shapes = abstract_model(replace(GQA, compute=Compute(param_dtype="bfloat16"), tie_embeddings=True))[1]
    assert {str(shape.dtype) for shape in shapes.values()} == {"bfloat16"}
    assert "head" not in shapes
