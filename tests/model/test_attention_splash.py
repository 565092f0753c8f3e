"""Splash attention against the definition: its kernels step by step in plain JAX, with blocks of 128."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_like.model import attention_splash
from easylm_like.model.attention import attend
from easylm_like.model.attention_splash import attend_splash, why_not_splash

B, T, N, K, H = 2, 256, 4, 2, 8


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks a row, so that blocks are skipped and accumulated."""
    monkeypatch.setattr(attention_splash, "LARGEST_BLOCK", 128)


def packed() -> tuple[np.ndarray, np.ndarray]:
    """Return segments and positions [B, T]: records that end at, before and after a block; padding."""
    segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row, lengths in enumerate([(60, 1, 67, 128), (90, 131)]):
        ends = np.cumsum(lengths)
        for number, (end, length) in enumerate(zip(ends, lengths, strict=True), start=1):
            segments[row, end - length : end], positions[row, end - length : end] = number, np.arange(length)
    return segments, positions


@pytest.mark.parametrize(
    ("window", "forgets"),
    [
        pytest.param(None, False, id="whole", marks=pytest.mark.slow),
        pytest.param(50, True, id="window, forgotten keys"),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_values_and_gradients_are_those_of_the_definition(window: int | None, forgets: bool) -> None:
    segments, positions = packed()
    random = np.random.default_rng(0)
    q, k, v, weight = (random.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N))
    real = (segments > 0)[:, :, None, None]
    hidden = forgets & (random.random((B, T)) < 0.2) & (positions > 0)
    places = ((segments, positions), (np.where(hidden, -1, segments), positions))

    def weighed(kernel: partial[jax.Array], *qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = kernel(*qkv, places, window=window)
        return jnp.sum(jnp.where(real, out * weight, 0)), out

    def run(kernel: partial[jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        (_, out), gradients = jax.jit(jax.value_and_grad(partial(weighed, kernel), (0, 1, 2), has_aux=True))(q, k, v)
        return out, gradients

    wanted, wanted_gradients = run(partial(attend))
    got, gradients = run(partial(attend_splash, interpret=True))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(np.where(real, got, 0), np.where(real, wanted, 0), atol=1e-5)
    for name, gradient, wanted_gradient in zip("qkv", gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted_gradient, atol=2e-5, err_msg=name)


def test_queries_are_scaled_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 / sqrt(48) is 0.13 % more in bfloat16, which changes a quarter of these 48 numbers."""
    monkeypatch.setattr(attention_splash, "_kernel", lambda *_: lambda q, *_: q)
    x = jnp.broadcast_to(jnp.linspace(1, 2, 48, dtype=jnp.bfloat16), (1, 128, 1, 48))
    ones = jnp.ones((1, 128), jnp.int32)
    got = attend_splash(x, x, x, ((ones, ones), (ones, ones)), window=None)
    assert (got == jnp.asarray(np.asarray(x, np.float64) / np.sqrt(48), jnp.bfloat16)).all()
    assert (got != x * jnp.asarray(48**-0.5, jnp.bfloat16)).any()


@pytest.mark.parametrize(("length", "block"), [(128, 128), (640, 128), (768, 384), (2048, 512), (4096, 512)])
def test_blocks_divide_the_row(length: int, block: int) -> None:
    assert attention_splash._block(length) == block


def test_it_is_for_tpu_and_for_rows_of_whole_lanes() -> None:
    assert why_not_splash(SimpleNamespace(platform="tpu", device_kind="TPU v5e"), 640) is None
    assert why_not_splash(jax.devices()[0], 640) == "it runs on TPU, the devices are cpu"
    assert why_not_splash(SimpleNamespace(platform="cuda"), 640) == "it runs on TPU, the devices are cuda"
    assert "multiple of 128, such as 512" in str(why_not_splash(SimpleNamespace(platform="tpu"), 600))


def test_a_jax_without_it_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_splash, "SPLASH", "jax.experimental.gone.splash_attention")
    reason = why_not_splash(SimpleNamespace(platform="tpu"), 128)
    assert "does not ship it in jax.experimental.gone" in str(reason)
