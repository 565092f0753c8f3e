"""How the next token is chosen from logits, for rows that each have settings of their own, in one compiled step.

Nothing is sorted: the cuts of top-k and top-p are found by bisection over the bits of the logits, which takes 32 sums
over the vocabulary, exact and several times as fast on a CPU. A token is drawn by inverting the cumulative distribution
at one uniform number a row, made of the row's seed and place alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from easylm_like.serve.request import MOST_ALTERNATIVES, Sampling

BLOCK = 128  # probabilities that are summed before the cumulative sum


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "top_k", "min_p", "repetition", "presence", "frequency", "seed"],
    meta_fields=[],
)
@dataclass(frozen=True, slots=True)
class Settings:
    """The fields of Sampling for B rows, each [B]; `seed` is uint32 [B, 2], high word first."""

    temperature: np.ndarray | jax.Array
    top_p: np.ndarray | jax.Array
    top_k: np.ndarray | jax.Array
    min_p: np.ndarray | jax.Array
    repetition: np.ndarray | jax.Array
    presence: np.ndarray | jax.Array
    frequency: np.ndarray | jax.Array
    seed: np.ndarray | jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["bias_BV", "prompt_BV", "answer_BV"], meta_fields=[])
@dataclass(frozen=True, slots=True)
class History:
    """What penalties look at: `bias` fp32 and how often each token occurs in prompt and answer, int32, all [B, V]."""

    bias_BV: np.ndarray | jax.Array
    prompt_BV: np.ndarray | jax.Array
    answer_BV: np.ndarray | jax.Array


def gather_settings(rows: Sequence[Sampling]) -> Settings:
    """Return the settings of some rows as arrays."""

    def floats(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], np.float32)

    seeds = np.array([row.seed % 2**64 for row in rows], np.uint64)
    return Settings(
        temperature=floats("temperature"),
        top_p=floats("top_p"),
        top_k=np.array([min(row.top_k, 2**30) for row in rows], np.int32),
        min_p=floats("min_p"),
        repetition=floats("repetition_penalty"),
        presence=floats("presence_penalty"),
        frequency=floats("frequency_penalty"),
        seed=np.stack([seeds >> np.uint64(32), seeds & np.uint64(2**32 - 1)], axis=1).astype(np.uint32),
    )


def greedy(logits_BV: jax.Array) -> jax.Array:
    """Return the likeliest token of every row, int32 [B]."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def draw(logits_BV: jax.Array, settings: Settings, places_B: jax.Array) -> jax.Array:
    """Return a token for every row, int32 [B], drawn as Sampling says; greedy where its temperature is 0.

    `places_B` is where in its text each token will stand.
    """
    hot_B1 = jnp.asarray(settings.temperature)[:, None]
    # The largest is 0 before the division, or rounding is larger than all differences where the temperature is tiny.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / jnp.where(hot_B1 > 0, hot_B1, 1.0)
    kept_BV = _keep(logits_BV, settings)
    p_BV = jnp.where(kept_BV, jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)), 0.0)
    u_B = jax.vmap(_uniform)(jnp.asarray(settings.seed), places_B)
    return jnp.where(hot_B1[:, 0] > 0, jax.vmap(_invert)(p_BV, u_B), greedy(logits_BV))


def penalise(logits_BV: jax.Array, settings: Settings, history: History) -> jax.Array:
    """Return the logits after repetition, presence and frequency penalty and the bias."""
    repetition_B1 = jnp.asarray(settings.repetition)[:, None]
    answer_BV = jnp.asarray(history.answer_BV)
    known_BV = (history.prompt_BV + answer_BV) > 0
    turned_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(known_BV, turned_BV, logits_BV)
    logits_BV -= jnp.asarray(settings.presence)[:, None] * (answer_BV > 0)
    return logits_BV - jnp.asarray(settings.frequency)[:, None] * answer_BV + history.bias_BV


def count(history: History, tokens_B: jax.Array) -> History:
    """Return the history after every row's answer has got another token."""
    answer_BV = jnp.asarray(history.answer_BV)
    return History(history.bias_BV, history.prompt_BV, answer_BV.at[jnp.arange(len(tokens_B)), tokens_B].add(1))


def logprobs(logits_BV: jax.Array, tokens_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (log p of the tokens [B], the highest log p [B, 20], their ids [B, 20])."""
    total_B = jax.nn.logsumexp(logits_BV, axis=-1)
    own_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    top_BA, ids_BA = jax.lax.top_k(logits_BV, min(MOST_ALTERNATIVES, logits_BV.shape[-1]))
    return own_B - total_B, top_BA - total_B[:, None], ids_BA


def _keep(logits_BV: jax.Array, settings: Settings) -> jax.Array:
    """Return bool [B, V]: what top_k, then the nucleus of what that leaves, then min_p keep."""
    keys_BV, top_k_B, top_p_B = _ordered(logits_BV), jnp.asarray(settings.top_k), jnp.asarray(settings.top_p)
    every_B1 = ((top_k_B <= 0) | (top_k_B >= logits_BV.shape[-1]))[:, None]
    kept_BV = every_B1 | (keys_BV >= _cut(keys_BV, jnp.ones_like(logits_BV), top_k_B.astype(jnp.float32))[:, None])
    p_BV = jnp.where(kept_BV, jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)), 0.0)
    nucleus_BV = keys_BV >= _cut(keys_BV, p_BV, top_p_B * jnp.sum(p_BV, axis=-1))[:, None]
    kept_BV &= (top_p_B >= 1)[:, None] | nucleus_BV
    return kept_BV & (p_BV >= jnp.asarray(settings.min_p)[:, None])  # the likeliest has 1 in p_BV


def _ordered(x: jax.Array) -> jax.Array:
    """Return int32 that are ordered as the fp32 numbers are."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _cut(keys_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """Return the largest key [B] such that the weights of the keys from it on add up to at least the target."""

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = ends  # the sum from low on is enough, that from high on is not
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)
        enough_B = jnp.sum(jnp.where(keys_BV >= middle_B[:, None], weights_BV, 0.0), axis=-1) >= target_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    low_B = jnp.min(keys_BV, axis=-1)
    return jax.lax.fori_loop(0, 32, halve, (low_B, jnp.max(keys_BV, axis=-1) + 1))[0]


def _uniform(seed: jax.Array, place: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), place))


def _invert(p_V: jax.Array, u: jax.Array) -> jax.Array:
    """Return the first token at which the cumulative sum of `p_V` exceeds u times the whole, int32.

    In two steps, so that the cumulative sums are short: the block of 128 tokens, then the token in it.
    """
    p_MK = jnp.pad(p_V, (0, -len(p_V) % BLOCK)).reshape(-1, BLOCK)
    sums_M = jnp.cumsum(jnp.sum(p_MK, axis=1))
    target = u * sums_M[-1]
    # Rounding may leave a sum a hair below its target: never a token, or a block, that has no probability.
    block = jnp.minimum(jnp.sum(sums_M <= target), _last(jnp.sum(p_MK, axis=1)))
    before = jnp.where(block > 0, sums_M[block - 1], 0.0)
    inside = jnp.minimum(jnp.sum(before + jnp.cumsum(p_MK[block]) <= target), _last(p_MK[block]))
    return (block * BLOCK + inside).astype(jnp.int32)


def _last(p: jax.Array) -> jax.Array:
    return jnp.max(jnp.where(p > 0, jnp.arange(len(p)), 0))
