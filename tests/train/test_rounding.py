"""Stochastic rounding: exact on average, the same wherever an array lies, and small steps that are not lost."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from easylm_like.errors import UserError
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.train.rounding import keep_narrow, random_bits, round_like, round_stochastically

KEY = jax.random.key(0)
MANY = 2**16
to_bfloat16 = jax.jit(partial(round_stochastically, dtype=jnp.bfloat16))
bits_of = jax.jit(random_bits, static_argnums=1)


def rounded(values: list[float] | np.ndarray, key: jax.Array = KEY) -> np.ndarray:
    return np.asarray(to_bfloat16(jnp.asarray(values, jnp.float32), key=key).astype(jnp.float32))


@pytest.mark.parametrize("value", [1.001, -3.14159, 1.7e-5, 777.7, -1e-30])
def test_the_mean_of_many_roundings_is_the_value_and_each_is_a_neighbour(value: float) -> None:
    got = rounded(np.full(MANY, value)).astype(np.float64)
    below, above = np.unique(got)
    assert below < value < above
    assert np.nextafter(jnp.bfloat16(below), jnp.bfloat16(np.inf)) == above
    deviation = (above - below) / 2 / MANY**0.5  # at most, of the mean
    assert got.mean() == pytest.approx(value, abs=4 * deviation, rel=0)


def test_what_bfloat16_has_stays() -> None:
    bits = np.arange(2**16, dtype=np.uint32) << 16
    every = bits[~np.isnan(bits.view(np.float32))].view(np.float32)
    got = np.asarray(to_bfloat16(jnp.asarray(every), key=KEY))
    np.testing.assert_array_equal(got.view(np.uint16), every.view(np.uint32) >> 16)


def test_finite_values_stay_finite_and_nan_stays_nan() -> None:
    largest = float(jnp.finfo(jnp.bfloat16).max)
    got = rounded(np.repeat(np.float32([3.4028235e38, -3.4028235e38, 3.39e38]), 64))
    np.testing.assert_array_equal(got, np.repeat([largest, -largest, largest], 64))
    odd = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)  # NaN by their last bits too
    assert np.isnan(rounded(odd)).all()


def test_float32_is_returned_as_it_is_and_other_dtypes_are_refused() -> None:
    x = jnp.asarray([1.001])
    assert round_stochastically(x, jnp.float32, KEY) is x
    with pytest.raises(UserError, match="float32 or bfloat16, not in float16"):
        round_stochastically(x, jnp.float16, KEY)


def test_bits_are_uniform_and_neighbours_have_nothing_in_common() -> None:
    bits = np.asarray(bits_of(KEY, (8, 32, 256)))
    ones = np.unpackbits(bits.view(np.uint8).reshape(-1, 4), axis=1).mean(0)
    np.testing.assert_allclose(ones, 0.5, atol=4 * 0.5 / MANY**0.5)
    uniform = bits / 2**32
    assert uniform.var() == pytest.approx(1 / 12, rel=0.02)
    other_key = np.asarray(bits_of(jax.random.key(1), (8, 32, 256))) / 2**32
    others = [np.roll(uniform, 1, axis) for axis in range(3)] + [other_key, uniform[::-1], uniform[..., ::-1]]
    for other in others:
        assert abs(np.corrcoef(uniform.ravel(), other.ravel())[0, 1]) < 5 / MANY**0.5


def test_every_array_has_noise_of_its_own_and_equal_dtypes_are_untouched() -> None:
    wide = {"a": jnp.full(256, 1.003), "b": jnp.full(256, 1.003), "c": jnp.full(3, 1.003), "n": jnp.arange(3)}
    like = {name: leaf.astype(jnp.bfloat16) if name in "ab" else leaf for name, leaf in wide.items()}
    got = jax.jit(round_like)(wide, like, KEY)
    assert {name: leaf.dtype for name, leaf in got.items()} == {name: leaf.dtype for name, leaf in like.items()}
    assert 0.3 < np.mean(np.asarray(got["a"]) == np.asarray(got["b"])) < 0.8
    for name in "cn":
        np.testing.assert_array_equal(got[name], wide[name])
    again, other = (jax.jit(round_like)(wide, like, key)["a"] for key in (KEY, jax.random.key(1)))
    np.testing.assert_array_equal(got["a"], again)
    assert np.any(np.asarray(got["a"]) != np.asarray(other))


def test_the_noise_does_not_depend_on_the_mesh() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    x = jax.random.normal(KEY, (3, 8, 4, 6))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")))
    got = to_bfloat16(spread, key=KEY)
    assert len({str(shard.index) for shard in got.addressable_shards}) == 8
    np.testing.assert_array_equal(np.asarray(got), np.asarray(to_bfloat16(x, key=KEY)))


def test_steps_too_small_for_bfloat16_add_up() -> None:
    """Nearest rounding keeps 1.0 for ever: half of bfloat16's step below 1 is 2^-9, twenty times the update."""

    def walk(weights: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        return round_stochastically(weights.astype(jnp.float32) - 1e-4, jnp.bfloat16, key), None

    start = jnp.ones(512, jnp.bfloat16)
    end, _ = jax.jit(partial(jax.lax.scan, walk))(start, jax.random.split(KEY, 1000))
    assert float((start.astype(jnp.float32) - 1e-4).astype(jnp.bfloat16)[0]) == 1.0
    assert float(end.astype(jnp.float32).mean()) == pytest.approx(0.9, abs=0.003)


def moment_after(optimizer: optax.GradientTransformation, steps: int) -> optax.ScaleByAdamState:
    gradient = jnp.ones(512)

    def step(state: optax.OptState, _: None) -> tuple[optax.OptState, None]:
        return optimizer.update(gradient, state)[1], None

    return jax.jit(lambda state: jax.lax.scan(step, state, None, steps)[0])(optimizer.init(gradient))


def test_a_second_moment_in_bfloat16_gets_where_float32_gets() -> None:
    adam = optax.scale_by_adam(b2=0.999)
    state = moment_after(keep_narrow(adam, "bfloat16", seed=1), 2000)
    assert (state.inner.nu.dtype, state.inner.mu.dtype, state.inner.count.dtype) == (jnp.bfloat16,) * 2 + (jnp.int32,)
    assert int(state.inner.count) == int(state.steps) == 2000
    wanted = float(moment_after(adam, 2000).nu[0])
    assert wanted == pytest.approx(1 - 0.999**2000, rel=1e-3)
    assert float(state.inner.nu.astype(jnp.float32).mean()) == pytest.approx(wanted, rel=0.01)
    nearest = moment_after(_nearest(adam), 2000)
    assert float(nearest.nu.astype(jnp.float32).mean()) < 0.5 * wanted


def test_moments_are_computed_in_float32() -> None:
    adam, gradient = optax.scale_by_adam(), jax.random.normal(KEY, (512,))
    narrow = keep_narrow(adam, "bfloat16", seed=1)
    updates, state = narrow.update(gradient, narrow.init(gradient))
    wanted, plain = adam.update(gradient, adam.init(gradient))
    np.testing.assert_array_equal(updates, wanted)
    kept = np.asarray(state.inner.mu, np.float32)
    np.testing.assert_allclose(kept, plain.mu, rtol=2**-7)
    assert np.any(kept != np.asarray(plain.mu))


def _nearest(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(updates: optax.Updates, state: optax.OptState, _: None = None) -> tuple[optax.Updates, optax.OptState]:
        updates, new = optimizer.update(updates, optax.tree.cast(state, jnp.float32))
        return updates, jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), new, state)

    return optax.GradientTransformation(lambda params: optimizer.init(params.astype(jnp.bfloat16)), update)
