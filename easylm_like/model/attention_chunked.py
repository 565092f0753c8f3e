"""Attention with memory linear in the length, in plain JAX: blocks of queries meet blocks of keys, those that see them.

The softmax is built up block by block and its scores are made anew in the backward pass (FlashAttention-2, arXiv
2307.08691). Which blocks meet is worked out from the segments, so that the work is that of the records and not that of
the rows: a row of short records costs little more than the records one by one. The loop runs over that list, with as
many turns as it has entries.

Where the mesh axis `sequence` cuts rows into pieces, each device has the queries of its piece and all keys of the row
(gathered, as in Llama 3's context parallelism, arXiv 2407.21783, section 3.3.2).

Letters beside those of attention.py: P groups of R rows that are worked on together, n blocks of queries and m of keys
in a row, C tokens in a block, Q = G C the queries of a block that share a key head.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from easylm_like.model.partition import on_cpu

Places = tuple[jax.Array, jax.Array]

MASKED = -1e30  # as in attention.py
PADDING = np.iinfo(np.int32).max  # padding lies at the end of a row; so numbered, segments ascend along it


@dataclass(frozen=True, slots=True)
class _Cut:
    """How rows are cut: C tokens a block, R rows together, and the sliding window; where pieces of a row start."""

    block: int
    rows: int
    window: int | None
    starts: tuple[int, ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_PnRC", "k_PmRC", "q_positions_PnRC", "k_positions_PmRC", "start"],
    meta_fields=[],
)
@dataclass(frozen=True, slots=True)
class _Blocks:
    """Segments and positions of the queries and of the keys, in blocks; `start` is the place of the first query."""

    q_PnRC: jax.Array
    k_PmRC: jax.Array
    q_positions_PnRC: jax.Array
    k_positions_PmRC: jax.Array
    start: jax.Array


def attend_chunked(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    places: tuple[Places, Places],
    *,
    window: int | None,
    max_segments: int = 0,
    start: jax.Array | int = 0,
) -> jax.Array:
    """Return what `attention.attend` returns, for packed rows.

    `k_BSKH` and `v_BSKH` may be whole rows where the queries are a piece of them, which begins at `start`.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Few cores do best with one row at a time, whose blocks stay in their caches; an accelerator wants it all at once.
    # Small blocks waste least on short records, large ones make better matmuls (benchmarks/attention.py).
    S = k_BSKH.shape[1]
    long = 0 < 512 * max_segments <= S
    cpu = on_cpu()
    cut = _Cut(256 if long or not cpu else 64, 1 if cpu else B, window, tuple(range(0, S, T)))
    (q_segments, q_positions), (k_segments, k_positions) = places
    q_segments, k_segments = (jnp.where(x == 0, PADDING, x) for x in (q_segments, k_segments))
    blocks = _Blocks(
        q_PnRC=_to_blocks(cut, q_segments, PADDING),
        k_PmRC=_to_blocks(cut, k_segments, PADDING),
        q_positions_PnRC=_to_blocks(cut, q_positions, PADDING),
        k_positions_PmRC=_to_blocks(cut, k_positions, PADDING),
        start=jnp.asarray(start, jnp.int32),
    )
    q_PnRKQH = _to_heads(cut, q_BTNH.reshape(B, T, K, N // K, H))
    k_PmRKCH, v_PmRKCH = (_to_heads(cut, x[:, :, :, None]) for x in (k_BSKH, v_BSKH))
    out_PnRKQH = _attend(cut, q_PnRKQH, k_PmRKCH, v_PmRKCH, blocks)
    P, n, R, _, _, _ = out_PnRKQH.shape
    out = out_PnRKQH.reshape(P, n, R, K, N // K, cut.block, H).transpose(0, 2, 1, 5, 3, 4, 6)
    return out.reshape(B, n * cut.block, N, H)[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cut: _Cut, q_PnRKQH: jax.Array, k_PmRKCH: jax.Array, v_PmRKCH: jax.Array, blocks: _Blocks) -> jax.Array:
    return _forward(cut, q_PnRKQH, k_PmRKCH, v_PmRKCH, blocks)[0]


Residuals = tuple[jax.Array, jax.Array, jax.Array, _Blocks, jax.Array, jax.Array]


def _attend_forward(
    cut: _Cut, q_PnRKQH: jax.Array, k_PmRKCH: jax.Array, v_PmRKCH: jax.Array, blocks: _Blocks
) -> tuple[jax.Array, Residuals]:
    out_PnRKQH, lse_PnRKQ = _forward(cut, q_PnRKQH, k_PmRKCH, v_PmRKCH, blocks)
    out_PnRKQH, lse_PnRKQ = checkpoint_name(out_PnRKQH, "attention"), checkpoint_name(lse_PnRKQ, "attention")
    return out_PnRKQH, (q_PnRKQH, k_PmRKCH, v_PmRKCH, blocks, out_PnRKQH, lse_PnRKQ)


def _forward(
    cut: _Cut, q_PnRKQH: jax.Array, k_PmRKCH: jax.Array, v_PmRKCH: jax.Array, blocks: _Blocks
) -> tuple[jax.Array, jax.Array]:
    """Return the result in the dtype of q and the fp32 logsumexp of every query's scores; sums and softmax in fp32."""
    meetings, pairs = _meetings(cut, blocks)

    def meet(turn: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sums, most, totals = carry
        p, i, j = (index[turn] for index in pairs)
        scores_RKQC = _scores(cut, blocks, (p, i, j), _at(q_PnRKQH, p, i), _at(k_PmRKCH, p, j))
        old_RKQ = _at(most, p, i)
        most_RKQ = jnp.maximum(old_RKQ, jnp.max(scores_RKQC, axis=-1))
        weights_RKQC, shrink_RKQ = jnp.exp(scores_RKQC - most_RKQ[..., None]), jnp.exp(old_RKQ - most_RKQ)
        total_RKQ = shrink_RKQ * _at(totals, p, i) + jnp.sum(weights_RKQC, axis=-1)
        sum_RKQH = _dot("RKQC,RKCH->RKQH", weights_RKQC.astype(v_PmRKCH.dtype), _at(v_PmRKCH, p, j))
        sum_RKQH += shrink_RKQ[..., None] * _at(sums, p, i)
        return _put(sums, sum_RKQH, p, i), _put(most, most_RKQ, p, i), _put(totals, total_RKQ, p, i)

    shape = q_PnRKQH.shape
    start = jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], MASKED, jnp.float32), jnp.zeros(shape[:-1], jnp.float32)
    sums, most, totals = jax.lax.fori_loop(0, meetings, meet, start)
    totals = jnp.maximum(totals, 1e-30)  # blocks of padding meet nobody
    return (sums / totals[..., None]).astype(q_PnRKQH.dtype), most + jnp.log(totals)


def _attend_backward(
    cut: _Cut, residuals: Residuals, dout_PnRKQH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_PnRKQH, k_PmRKCH, v_PmRKCH, blocks, out_PnRKQH, lse_PnRKQ = residuals
    dtype, scale = q_PnRKQH.dtype, q_PnRKQH.shape[-1] ** -0.5
    inner_PnRKQ = jnp.sum(dout_PnRKQH.astype(jnp.float32) * out_PnRKQH.astype(jnp.float32), axis=-1)
    meetings, pairs = _meetings(cut, blocks)

    def meet(turn: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dq, dk, dv = carry
        p, i, j = (index[turn] for index in pairs)
        q_RKQH, k_RKCH, dout_RKQH = _at(q_PnRKQH, p, i), _at(k_PmRKCH, p, j), _at(dout_PnRKQH, p, i)
        scores_RKQC = _scores(cut, blocks, (p, i, j), q_RKQH, k_RKCH)
        weights_RKQC = jnp.exp(scores_RKQC - _at(lse_PnRKQ, p, i)[..., None])
        dweights_RKQC = _dot("RKQH,RKCH->RKQC", dout_RKQH, _at(v_PmRKCH, p, j))
        dscores_RKQC = weights_RKQC * (dweights_RKQC - _at(inner_PnRKQ, p, i)[..., None]) * scale
        dscores_RKQC = dscores_RKQC.astype(dtype)
        dq_RKQH = _at(dq, p, i) + _dot("RKQC,RKCH->RKQH", dscores_RKQC, k_RKCH)
        dk_RKCH = _at(dk, p, j) + _dot("RKQC,RKQH->RKCH", dscores_RKQC, q_RKQH)
        dv_RKCH = _at(dv, p, j) + _dot("RKQC,RKQH->RKCH", weights_RKQC.astype(dtype), dout_RKQH)
        return _put(dq, dq_RKQH, p, i), _put(dk, dk_RKCH, p, j), _put(dv, dv_RKCH, p, j)

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_PnRKQH, k_PmRKCH, v_PmRKCH))
    dq, dk, dv = jax.lax.fori_loop(0, meetings, meet, start)
    return dq.astype(dtype), dk.astype(k_PmRKCH.dtype), dv.astype(v_PmRKCH.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _meetings(cut: _Cut, blocks: _Blocks) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return how many pairs of blocks meet, and their (group, block of queries, block of keys), sorted, then zeros."""
    P, n, _, C = blocks.q_PnRC.shape
    m = blocks.k_PmRC.shape[1]
    # Segments ascend, but for forgotten keys.
    q_first_PnR, q_last_PnR = blocks.q_PnRC[..., 0], blocks.q_PnRC[..., -1]
    k_first_PmR = jnp.min(jnp.where(blocks.k_PmRC < 0, PADDING, blocks.k_PmRC), axis=-1)
    k_last_PmR = jnp.max(blocks.k_PmRC, axis=-1)
    share_Pnm = jnp.any(
        (k_last_PmR[:, None, :] >= q_first_PnR[:, :, None])
        & (k_first_PmR[:, None, :] <= q_last_PnR[:, :, None])
        & (q_first_PnR[:, :, None] != PADDING),
        axis=-1,
    )
    back_nm = (np.arange(n)[:, None] - np.arange(m)[None, :]) * C  # from the first query to the first key

    def near(back_nm: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """Whether the last query of one may see the first key of the other, and the first the last."""
        near_nm = back_nm + C > 0
        return near_nm if cut.window is None else near_nm & (back_nm - C + 1 < cut.window)

    meet_Pnm = share_Pnm & near(back_nm + blocks.start)
    most = max(int(near(back_nm + start).sum()) for start in cut.starts)
    return jnp.sum(meet_Pnm), jnp.nonzero(meet_Pnm, size=P * most, fill_value=0)


def _scores(cut: _Cut, blocks: _Blocks, pair: tuple[jax.Array, ...], q_RKQH: jax.Array, k_RKCH: jax.Array) -> jax.Array:
    """Return the fp32 scores of a block of queries with a block of keys, MASKED where a query does not see a key."""
    p, i, j = pair
    back_RCC = _at(blocks.q_positions_PnRC, p, i)[:, :, None] - _at(blocks.k_positions_PmRC, p, j)[:, None, :]
    seen_RCC = (_at(blocks.q_PnRC, p, i)[:, :, None] == _at(blocks.k_PmRC, p, j)[:, None, :]) & (back_RCC >= 0)
    if cut.window is not None:
        seen_RCC &= back_RCC < cut.window
    groups = q_RKQH.shape[2] // cut.block
    scores_RKQC = _dot("RKQH,RKCH->RKQC", q_RKQH, k_RKCH) * q_RKQH.shape[-1] ** -0.5
    return jnp.where(jnp.tile(seen_RCC, (1, groups, 1))[:, None], scores_RKQC, MASKED)


def _dot(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _to_blocks(cut: _Cut, x: jax.Array, padding: int) -> jax.Array:
    """[B, T, ...] -> [P, n, R, C, ...]; a length that is no multiple of C is filled up with `padding`."""
    B, T, *rest = x.shape
    n = -(-T // cut.block)
    x = jnp.pad(x, ((0, 0), (0, n * cut.block - T), *((0, 0) for _ in rest)), constant_values=padding)
    return jnp.moveaxis(x.reshape(B // cut.rows, cut.rows, n, cut.block, *rest), 1, 2)


def _to_heads(cut: _Cut, x_BTKGH: jax.Array) -> jax.Array:
    """[B, T, K, G, H] -> [P, n, R, K, G C, H]."""
    x_PnRCKGH = _to_blocks(cut, x_BTKGH, 0)
    P, n, R, C, K, G, H = x_PnRCKGH.shape
    return x_PnRCKGH.transpose(0, 1, 2, 4, 5, 3, 6).reshape(P, n, R, K, G * C, H)


def _at(x: jax.Array, p: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(x, (p, i, *(0,) * (x.ndim - 2)), (1, 1, *x.shape[2:]))[0, 0]


def _put(x: jax.Array, part: jax.Array, p: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, part[None, None], (p, i, *(0,) * (x.ndim - 2)))
