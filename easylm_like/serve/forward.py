"""The two steps of decoding over caches that lie apart for every layer: a token of each of B rows, T tokens of one row.

Keys are kept as [B, K, H, S] and values as [B, K, S, H]: both products of attention then run over whole vectors. A
cache's own shape is the bucket: nothing of it is sliced, because XLA:CPU copies a slice before a product.

Letters as in model/llama.py; G = N / K query heads share a key head.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import rms_norm
from easylm_like.model.rope import rope_angles, rotate
from easylm_like.serve.weights import Layer, Weights, dot, logits

MASKED = -1e30


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclass(frozen=True, slots=True)
class Cache:
    """For every layer keys [B, K, H, S] and values [B, K, S, H]."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    @property
    def rows(self) -> int:
        """B."""
        return int(self.k[0].shape[0])

    @property
    def length(self) -> int:
        """S, the most tokens that a row can hold."""
        return int(self.k[0].shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers together."""
        return sum(array.nbytes for array in (*self.k, *self.v))


def decode(
    config: LlamaConfig,
    weights: Weights,
    cache: Cache,
    tokens_B: jax.Array,
    lengths_B: jax.Array,
    *,
    scatter: bool = False,
) -> tuple[jax.Array, jax.Array, Cache]:
    """Read one token of every row: return (fp32 logits [B, V], lengths + 1, the cache with them).

    Row b has `lengths_B[b]` tokens already and gets its token at that place; a row without a request is computed too,
    and nobody looks at it. With `scatter` the rows of a cache are written at once, as accelerators do it best; XLA:CPU
    makes a loop of that.
    """
    S = cache.length
    places_B = jnp.minimum(lengths_B, S - 1)
    angles_B1h = rope_angles(config, places_B[:, None])
    seen_BS = jnp.arange(S) <= places_B[:, None]
    if config.sliding_window:
        seen_BS &= jnp.arange(S) > places_B[:, None] - config.sliding_window
    x_BD = weights.embed[tokens_B]
    keys: list[jax.Array] = []
    values: list[jax.Array] = []
    for layer, k_BKHS, v_BKSH in zip(weights.layers, cache.k, cache.v, strict=True):
        h_BD = rms_norm(x_BD, _array(layer, "attention_norm"), config.norm_eps)
        q_BNH, k_BKH, v_BKH = _queries_keys_values(config, layer, h_BD)
        q_BNH, k_BKH = rotate(q_BNH[:, None], angles_B1h)[:, 0], rotate(k_BKH[:, None], angles_B1h)[:, 0]
        k_BKHS = _write(k_BKHS, k_BKH, places_B, axis=3, scatter=scatter)
        v_BKSH = _write(v_BKSH, v_BKH, places_B, axis=2, scatter=scatter)
        keys.append(k_BKHS)
        values.append(v_BKSH)
        q_BKGH = q_BNH.reshape(len(tokens_B), config.n_kv_heads, -1, config.head_dim)
        a_BKGH = _attend_one(q_BKGH, k_BKHS, v_BKSH, seen_BS)
        x_BD = x_BD + dot(layer["o"], a_BKGH.reshape(len(tokens_B), -1))
        x_BD = x_BD + _feed_forward(config, layer, x_BD)
    x_BD = rms_norm(x_BD, weights.final_norm, config.norm_eps)
    return logits(config, weights, x_BD), lengths_B + 1, Cache(tuple(keys), tuple(values))


def prefill(
    config: LlamaConfig, weights: Weights, row: Cache, tokens_T: jax.Array, start: jax.Array
) -> tuple[jax.Array, Cache]:
    """Read T tokens of one row from place `start` on: return (x [T, D] after the last norm, the row with them).

    `start` + T must not be beyond the row's length. What stands after the prompt's end is overwritten by later tokens
    before anything sees it.
    """
    S, T = row.length, len(tokens_T)
    places_T = start + jnp.arange(T)
    angles_1Th = rope_angles(config, places_T[None])
    seen_TS = jnp.arange(S) <= places_T[:, None]
    if config.sliding_window:
        seen_TS &= jnp.arange(S) > places_T[:, None] - config.sliding_window
    x_TD = weights.embed[tokens_T]
    keys: list[jax.Array] = []
    values: list[jax.Array] = []
    for layer, k_1KHS, v_1KSH in zip(weights.layers, row.k, row.v, strict=True):
        h_TD = rms_norm(x_TD, _array(layer, "attention_norm"), config.norm_eps)
        q_TNH, k_TKH, v_TKH = _queries_keys_values(config, layer, h_TD)
        q_TNH, k_TKH = rotate(q_TNH[None], angles_1Th)[0], rotate(k_TKH[None], angles_1Th)[0]
        k_1KHS = jax.lax.dynamic_update_slice(k_1KHS, k_TKH.transpose(1, 2, 0)[None], (0, 0, 0, start))
        v_1KSH = jax.lax.dynamic_update_slice(v_1KSH, v_TKH.transpose(1, 0, 2)[None], (0, 0, start, 0))
        keys.append(k_1KHS)
        values.append(v_1KSH)
        q_KGTH = q_TNH.reshape(T, config.n_kv_heads, -1, config.head_dim).transpose(1, 2, 0, 3)
        scores = jnp.einsum("KGTH,KHS->KGTS", q_KGTH, k_1KHS[0], preferred_element_type=jnp.float32)
        p_KGTS = _softmax(scores, config.head_dim, seen_TS)
        a_TKGH = jnp.einsum("KGTS,KSH->TKGH", p_KGTS.astype(x_TD.dtype), v_1KSH[0])
        x_TD = x_TD + dot(layer["o"], a_TKGH.reshape(T, -1))
        x_TD = x_TD + _feed_forward(config, layer, x_TD)
    return rms_norm(x_TD, weights.final_norm, config.norm_eps), Cache(tuple(keys), tuple(values))


def empty_cache(config: LlamaConfig, rows: int, length: int, dtype: str) -> Cache:
    """Return a cache of zeros."""
    k_shape = (rows, config.n_kv_heads, config.head_dim, length)
    v_shape = (rows, config.n_kv_heads, length, config.head_dim)
    layers = range(config.n_layers)
    return Cache(tuple(jnp.zeros(k_shape, dtype) for _ in layers), tuple(jnp.zeros(v_shape, dtype) for _ in layers))


def insert_layer(
    cache: tuple[jax.Array, jax.Array], row: tuple[jax.Array, jax.Array], at: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return one layer's keys and values with those of `row`, which may be shorter, in row `at`."""
    (k, v), (k_row, v_row) = cache, row
    return jax.lax.dynamic_update_slice(k, k_row, (at, 0, 0, 0)), jax.lax.dynamic_update_slice(v, v_row, (at, 0, 0, 0))


def extract_layer(cache: tuple[jax.Array, jax.Array], at: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Return the first `length` places of row `at` of one layer, filled up with zeros if there are fewer."""
    k, v = (jax.lax.dynamic_slice_in_dim(array, at, 1) for array in cache)
    more = max(0, length - k.shape[3])
    k = jnp.pad(k[..., :length], ((0, 0), (0, 0), (0, 0), (0, more)))
    return k, jnp.pad(v[:, :, :length], ((0, 0), (0, 0), (0, more), (0, 0)))


def _write(cache: jax.Array, new_BKH: jax.Array, places_B: jax.Array, *, axis: int, scatter: bool) -> jax.Array:
    """Return the cache with one place of every row, along `axis`, written anew."""
    new = jnp.expand_dims(new_BKH, axis)
    if scatter:
        return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))(cache, new, places_B)
    for row in range(len(cache)):
        start = [row, 0, 0, 0]
        cache = jax.lax.dynamic_update_slice(cache, new[row, None], (*start[:axis], places_B[row], *start[axis + 1 :]))
    return cache


def _attend_one(q_BKGH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, seen_BS: jax.Array) -> jax.Array:
    """Return [B, K, G, H]: attention of one query a row; scores and softmax in fp32."""
    head_dim, dtype = q_BKGH.shape[-1], q_BKGH.dtype
    if len(q_BKGH) == 1:
        # XLA:CPU drops an axis of size 1 before a product, and the cache is then no longer updated in place (SmolLM2,
        # S 1024: 60 MB of copies a token); sums of products keep it.
        scores = jnp.sum(q_BKGH[..., None] * k_BKHS[:, :, None], axis=3, dtype=jnp.float32)
        p_BKGS = _softmax(scores, head_dim, seen_BS[:, None, None])
        return jnp.sum(p_BKGS[..., None] * v_BKSH[:, :, None], axis=3).astype(dtype)
    scores = jnp.einsum("BKGH,BKHS->BKGS", q_BKGH, k_BKHS, preferred_element_type=jnp.float32)
    p_BKGS = _softmax(scores, head_dim, seen_BS[:, None, None])
    return jnp.einsum("BKGS,BKSH->BKGH", p_BKGS.astype(dtype), v_BKSH)


def _softmax(scores: jax.Array, head_dim: int, seen: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(seen, scores * head_dim**-0.5, MASKED), axis=-1)


def _queries_keys_values(config: LlamaConfig, layer: Layer, h_TD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return q [T, N, H], k and v [T, K, H], with Qwen2's bias and Qwen3's norm, not yet turned."""
    heads = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads}
    found = []
    for name, number in heads.items():
        x = dot(layer[name], h_TD)
        if config.qkv_bias:
            x = x + _array(layer, f"{name}_bias")
        x = x.reshape(len(h_TD), number, config.head_dim)
        if config.qk_norm and name != "v":
            x = rms_norm(x, _array(layer, f"{name}_norm"), config.norm_eps)
        found.append(x)
    return found[0], found[1], found[2]


def _feed_forward(config: LlamaConfig, layer: Layer, x_TD: jax.Array) -> jax.Array:
    h_TD = rms_norm(x_TD, _array(layer, "mlp_norm"), config.norm_eps)
    return dot(layer["down"], jax.nn.silu(dot(layer["gate"], h_TD)) * dot(layer["up"], h_TD))


def _array(layer: Layer, name: str) -> jax.Array:
    found = layer[name]
    assert isinstance(found, jax.Array), f"{name} is quantised"
    return found
