"""Causal attention with grouped heads over packed rows: one signature, and the backends behind it.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K, H head size.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from easylm_like.errors import UserError
from easylm_like.model.attention_chunked import attend_chunked
from easylm_like.model.attention_cudnn import attend_cudnn, why_not_cudnn
from easylm_like.model.attention_splash import attend_splash, why_not_splash
from easylm_like.model.config import Attention, LlamaConfig
from easylm_like.model.partition import partition_spec

MASKED = -1e30  # finite, so that a query with nothing to see gives numbers and not NaN

Places = tuple[jax.Array, jax.Array]  # (segments, positions)
Kernel = Callable[[jax.Array, jax.Array, jax.Array, tuple[Places, Places]], jax.Array]


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    places: tuple[Places, Places],
    *,
    window: int | None = None,
    backend: Attention = Attention.XLA,
    max_segments: int = 0,
) -> jax.Array:
    """Return [B, T, N, H]: softmax(q k / sqrt(H)) v, scores and softmax in fp32.

    `places` are the queries' and the keys': (segments, positions), int32 [B, T] or [B, S] each. A query sees the keys
    of its own segment at its own position or before it, and fewer than `window` positions before it. One rule serves
    training (packed rows, restarted positions), decoding (an empty cache slot has segment 0) and forgotten keys
    (segment -1), so that none can mask differently.

    All backends but XLA want what the loader makes: T = S, the records of a row one after the other, positions that
    count up within each; keys differ from queries in forgotten segments only. What they return at padding (segment 0)
    is finite and means nothing. On a mesh every device computes its rows, heads and piece of the length; chunked then
    gathers the keys and values of the whole rows.
    """
    kernels: dict[Attention, Kernel] = {
        Attention.XLA: partial(_attend_xla, window=window),
        Attention.CHUNKED: partial(attend_chunked, window=window, max_segments=max_segments),
        Attention.CUDNN: partial(attend_cudnn, window=window, max_segments=max_segments),
        Attention.SPLASH: partial(attend_splash, window=window),
    }
    assert backend in kernels, f"{backend}: choose_attention resolves it first"
    kernel = kernels[backend]
    mesh = jax.sharding.get_abstract_mesh()
    if backend == Attention.XLA or mesh.empty or mesh.size == 1:
        return kernel(q_BTNH, k_BSKH, v_BSKH, places)
    heads = partition_spec(("batch", "length", "heads", "head"))
    rows = (partition_spec(("batch", "length")),) * 2

    def piece(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: tuple[Places, Places]) -> jax.Array:
        if mesh.shape.get("sequence", 1) == 1:
            return kernel(q_BTNH, k_BSKH, v_BSKH, places)
        start = jax.lax.axis_index("sequence") * q_BTNH.shape[1]
        # Asked for whole rows of keys, the partitioner would gather what they are made of, D numbers a token.
        whole = partial(jax.lax.all_gather, axis_name="sequence", axis=1, tiled=True)
        k_BSKH, v_BSKH, places = whole(k_BSKH), whole(v_BSKH), (places[0], jax.tree.map(whole, places[1]))
        return attend_chunked(q_BTNH, k_BSKH, v_BSKH, places, window=window, max_segments=max_segments, start=start)

    # A kernel is opaque to the partitioner; rows and heads are independent, so every device runs it on its own.
    shard = jax.shard_map(piece, in_specs=(heads, heads, heads, (rows, rows)), out_specs=heads, check_vma=False)
    return shard(q_BTNH, k_BSKH, v_BSKH, places)


def choose_attention(wanted: Attention, config: LlamaConfig, mesh: Mesh, row_length: int) -> Attention:
    """Return the backend that trains `config` on rows of that length and the devices of `mesh`; AUTO: the fastest.

    Where the mesh axis `sequence` cuts rows into pieces, chunked and XLA see the other pieces.

    Raises:
        UserError: the backend that was asked for cannot; says why and which to take.
    """
    reasons = why_not(config, mesh, row_length)
    if wanted == Attention.AUTO:
        return next((backend for backend, reason in reasons.items() if reason is None), Attention.XLA)
    if reason := reasons.get(wanted):
        raise UserError(f"model.attention {wanted.value}: {reason}; take auto, which chooses what the devices can")
    return wanted


def why_not(config: LlamaConfig, mesh: Mesh, row_length: int) -> dict[Attention, str | None]:
    """Return the backends, fastest first, each with the reason why it cannot train here, or None."""
    device, sequence = mesh.devices.flat[0], mesh.shape["sequence"]
    backends: dict[Attention, str | None] = {
        Attention.CUDNN: why_not_cudnn(config, device),
        Attention.SPLASH: why_not_splash(device, row_length),
        Attention.CHUNKED: None,
    }
    if sequence > 1:
        reason = f"it cannot look beyond a piece of a row, and mesh.sequence is {sequence}"
        backends |= {Attention.CUDNN: reason, Attention.SPLASH: reason}
    return backends


def _attend_xla(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: tuple[Places, Places], *, window: int | None
) -> jax.Array:
    """The definition: every score is made, and what is not seen is masked."""
    (q_segments, q_positions), (k_segments, k_positions) = places
    back_BTS = q_positions[:, :, None] - k_positions[:, None, :]
    visible_BTS = (q_segments[:, :, None] == k_segments[:, None, :]) & (back_BTS >= 0)
    if window is not None:
        visible_BTS &= back_BTS < window
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return checkpoint_name(out_BTKGH.reshape(B, T, N, H), "attention")
