"""Causal attention with grouped heads over packed rows: one signature, and the backends behind it.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K, H head size.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a query with nothing to see gives numbers and not NaN


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_places: tuple[jax.Array, jax.Array],
    k_places: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Return [B, T, N, H]: softmax(q k / sqrt(H)) v, scores and softmax in fp32.

    A place is (segments, positions), int32 [B, T] or [B, S] each. A query sees the keys of its own segment at its own
    position or before it. One rule serves training (packed rows, restarted positions) and decoding (an empty cache
    slot has segment 0), so the two cannot mask differently.
    """
    (q_segments, q_positions), (k_segments, k_positions) = q_places, k_places
    visible_BTS = (q_segments[:, :, None] == k_segments[:, None, :]) & (
        q_positions[:, :, None] >= k_positions[:, None, :]
    )
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(B, T, N, H)
