"""Dropout and forgetful causal masking: what is dropped, what is hidden from whom, the same however it is computed."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easylm_like.model.config import Attention, Compute, LlamaConfig
from easylm_like.model.llama import Params, abstract_model, param_shardings
from easylm_like.model.partition import MeshConfig, make_mesh

D, T = 16, 24
PLAIN = Compute()
SHAPE = LlamaConfig(
    vocab_size=64, d_model=D, d_ff=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, max_length=64, qkv_bias=True
)
LENGTHS = (9, 5, 7)  # the records of every row; three tokens of padding
STARTS = (0, 9, 14)
SEGMENTS = np.repeat([1, 2, 3, 0], [*LENGTHS, 3]).astype(np.int32)
POSITIONS = np.concatenate([np.arange(n) for n in (*LENGTHS, 0)] + [np.zeros(3)]).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def run(config: LlamaConfig, params: Params, tokens_BT: jax.Array, noise_B: jax.Array | None = None) -> jax.Array:
    """Return the model's x [B, T, D]; every row has the records of LENGTHS."""
    places = tuple(jnp.broadcast_to(row, tokens_BT.shape) for row in (SEGMENTS, POSITIONS))
    x_BTD, _ = nnx.merge(abstract_model(config)[0], params)(tokens_BT, (places[0], places[1]), noise_B=noise_B)
    return x_BTD


def noisy(dropout: float = 0.0, forget: float = 0.0, compute: Compute = PLAIN) -> LlamaConfig:
    return replace(SHAPE, compute=replace(compute, dropout=dropout, forget=forget))


def keys(number: int) -> jax.Array:
    return jax.random.split(jax.random.key(1), number)


@pytest.fixture(scope="module")
def params() -> Params:
    random = np.random.default_rng(0)
    shapes = abstract_model(SHAPE)[1].items()
    return {
        name: jnp.asarray(random.normal(name.endswith("norm"), 0.25, like.shape), "float32") for name, like in shapes
    }


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SHAPE.vocab_size, (8, T))


def test_no_rate_is_no_noise(params: Params, tokens: np.ndarray) -> None:
    without = run(noisy(0.5, 0.5), params, tokens)
    np.testing.assert_array_equal(run(noisy(), params, tokens, keys(8)), without)
    assert not np.array_equal(run(noisy(dropout=0.01), params, tokens, keys(8)), without)


# Dropout, in a model whose layers are known: RMSNorm divides by the constant 1e9, of which the scales make 1 (or 0);
# every token is embedded as ones, attention adds ATTENTION to every feature, the feed-forward a large number.
RATE, ATTENTION, LARGE = 0.25, 100.0, 1000.0


def plain_layers(n_layers: int, *, feed_forward: bool) -> tuple[LlamaConfig, Params]:
    config = replace(noisy(dropout=RATE), n_layers=n_layers, norm_eps=1e18)
    _, shapes, _ = abstract_model(config)
    values = dict.fromkeys(shapes, 0.0) | {"embed": 1.0, "final_norm": 1e9, "v_bias": 1.0, "o": ATTENTION / 16}
    if feed_forward:
        values |= {"mlp_norm": 1e9, "gate": 0.01, "up": 0.01, "down": 10.0}
    return config, {name: jnp.full(shapes[name].shape, value, jnp.float32) for name, value in values.items()}


def test_the_embedding_and_both_branches_are_dropped_apart_and_keep_their_mean() -> None:
    config, params = plain_layers(1, feed_forward=True)
    x_BTD = np.asarray(run(config, params, np.zeros((128, T), int), keys(128)))
    without = x_BTD < LARGE  # the feed-forward's result was dropped here
    assert without.mean() == pytest.approx(RATE, abs=0.01)
    rest = x_BTD[without] * (1 - RATE)
    attention = np.round(rest / ATTENTION)
    assert set(attention) == {0, 1}, "what is kept is divided by 1 - rate"
    assert attention.mean() == pytest.approx(1 - RATE, abs=0.02)
    embedded = rest - ATTENTION * attention
    np.testing.assert_allclose(embedded, np.round(embedded), atol=1e-3)
    assert set(np.round(embedded)) == {0, 1}
    for kept in (0, 1):
        assert np.round(embedded[attention == kept]).mean() == pytest.approx(1 - RATE, abs=0.02)


def test_every_layer_row_and_token_is_dropped_apart() -> None:
    config, params = plain_layers(2, feed_forward=False)
    config = replace(config, compute=replace(config.compute, dropout=0.5))
    x_BTD = np.asarray(run(config, params, np.zeros((128, T), int), keys(128)))
    times = np.round(x_BTD / (2 * ATTENTION)).astype(int)  # in how many layers the feature was kept
    np.testing.assert_allclose(np.bincount(times.ravel()) / times.size, [0.25, 0.5, 0.25], atol=0.01)
    for axis in range(3):  # neighbours along rows, tokens and features know nothing of each other
        ours, next_ones = (np.take(times, range(i, times.shape[axis] - 1 + i), axis).ravel() for i in (0, 1))
        assert abs(np.corrcoef(ours, next_ones)[0, 1]) < 0.02
    again = run(config, params, np.zeros((128, T), int), keys(128))
    np.testing.assert_array_equal(again, x_BTD)


# Forgetful causal masking.
MOST, DRAWS = 0.6, 64


def influences(config: LlamaConfig, params: Params, tokens_T: np.ndarray) -> np.ndarray:
    """Return [draw, S, T]: whether another token at S changes the model's x at T, under the same noise."""
    rows = np.repeat(tokens_T[None], T + 1, axis=0)
    rows[np.arange(T), np.arange(T)] += 1
    rows %= SHAPE.vocab_size
    noise = jnp.repeat(keys(DRAWS), T + 1)
    x = np.asarray(run(config, params, np.tile(rows, (DRAWS, 1)), noise)).reshape(DRAWS, T + 1, T, D)
    return np.abs(x[:, :T] - x[:, T:]).max(-1) > 1e-7


@pytest.fixture(scope="module", params=[Attention.XLA, Attention.CHUNKED])
def influence(request: pytest.FixtureRequest, params: Params, tokens: np.ndarray) -> np.ndarray:
    return influences(noisy(0.0, MOST, Compute(attention=request.param)), params, tokens[0])


def test_a_hidden_token_is_hidden_from_all_later_ones_and_still_learns(influence: np.ndarray) -> None:
    causal = (SEGMENTS[:, None] == SEGMENTS[None]) & np.tri(T, dtype=bool).T & (SEGMENTS > 0)
    later = causal & ~np.eye(T, dtype=bool)
    real = SEGMENTS > 0
    assert not influence[:, :, real][:, ~causal[:, real]].any(), "an earlier token or another record"
    assert influence[:, np.eye(T, dtype=bool)].all(), "its own place still knows it"
    some, every = (influence & later).any(-1), (influence | ~later).all(-1)
    followed = later.any(-1)
    np.testing.assert_array_equal(some[:, followed], every[:, followed])
    assert some[:, STARTS].all(), "the first token of a record is never hidden"
    hideable = followed & (POSITIONS > 0)
    share = 1 - some[:, hideable].mean(-1)
    assert share.mean() == pytest.approx(MOST / 2, abs=0.06)
    assert share.std() > 0.15, "the rate itself is drawn: of one rate, chance alone would make 0.11"


def test_a_sliding_window_always_holds_a_token_that_is_not_hidden(params: Params, tokens: np.ndarray) -> None:
    """Else a query would see nothing. In one layer, the query `window - 1` after the token is the last that sees it."""
    window = 3
    seen = influences(replace(noisy(0.0, 0.99), sliding_window=window, n_layers=1), one_layer(params), tokens[0])
    for at in range(T - window):
        if SEGMENTS[at] and SEGMENTS[at] == SEGMENTS[at + window - 1]:
            always = POSITIONS[at] % window == 0
            assert seen[:, at, at + window - 1].all() == always, at
    assert not any(seen[:, at, at + window].any() for at in range(T - window))


def one_layer(params: Params) -> Params:
    return {name: weight if name in ("embed", "final_norm", "head") else weight[:1] for name, weight in params.items()}


CHUNKED = Compute(attention=Attention.CHUNKED)
COMPUTE = {
    "unrolled": (Compute(scan_layers=False), None),
    "chunked": (CHUNKED, None),
    "fsdp-4-sequence-2": (PLAIN, MeshConfig(fsdp=4, sequence=2)),
    "chunked, fsdp-4-tensor-2": (CHUNKED, MeshConfig(fsdp=4, tensor=2)),
}


@pytest.mark.parametrize(("compute", "sizes"), COMPUTE.values(), ids=COMPUTE)
def test_noise_is_the_same_however_it_is_computed(
    params: Params, tokens: np.ndarray, compute: Compute, sizes: MeshConfig | None
) -> None:
    wanted = np.asarray(run(noisy(0.2, 0.5), params, tokens, keys(8)))
    config = noisy(0.2, 0.5, compute)
    if sizes is None:
        got = run(config, params, tokens, keys(8))
    else:
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):
            got = run(config, jax.device_put(params, param_shardings(config, mesh)), tokens, keys(8))
    real = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got)[:, real], wanted[:, real], atol=1e-5)
    plain = np.asarray(run(noisy(), params, tokens))
    assert np.abs(wanted - plain).max() > 0.1
