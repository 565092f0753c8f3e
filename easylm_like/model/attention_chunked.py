"""Attention with memory linear in the length, in plain JAX."""

import jax
import jax.numpy as jnp

Places = tuple[jax.Array, jax.Array]


def attend_chunked(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: tuple[Places, Places], *, window: int | None
) -> jax.Array:
    """`attention.attend` for packed rows."""
    (q_segments, q_positions), (k_segments, k_positions) = places
    back = q_positions[:, :, None] - k_positions[:, None, :]
    visible = (q_segments[:, :, None] == k_segments[:, None, :]) & (back >= 0)
    if window is not None:
        visible &= back < window
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q = q_BTNH.reshape(B, T, K, N // K, H)
    s = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    w = jax.nn.softmax(jnp.where(visible[:, None, None], s, -1e30), axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", w, v_BSKH).reshape(B, T, N, H)
