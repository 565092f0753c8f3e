"""Decoding with a KV cache: prompts of any lengths in one batch, greedy or sampled, stopped at given ids.

Prompts are padded on the right; padding has segment 0, so no query ever sees it, and every row's answer takes the same
cache slots after the longest prompt while its positions go on from its own length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import Cache, GraphDef, Params, abstract_model, empty_cache
from easylm_like.model.partition import constrain

ROWS = 32  # prompts that are decoded at a time

Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array, Cache | None]  # step, x_B1D, out_BM, done_B, cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy; top_k 0 and top_p 1 keep every token.

    Raises:
        UserError: temperature or top_k is negative, or top_p is not above 0 and at most 1.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"temperature and top_k must be 0 or more and top_p above 0 and at most 1, got {self}")


def generate(
    config: LlamaConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    max_new: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> list[np.ndarray]:
    """Return each prompt's continuation, int32 ids without the stop id that ended it.

    A continuation of `max_new` ids was not ended by a stop id. The text sampled for a prompt depends on `seed` and
    the prompt's index, not on its neighbours in the batch.

    Raises:
        UserError: a prompt is empty, or longer than the model's max_length allows.
    """
    longest = max(map(len, prompts), default=0)
    if min(map(len, prompts), default=1) < 1 or longest + max_new > config.max_length:
        raise UserError(
            f"prompts need 1 to {config.max_length - max_new} ids (max_length - max_new), the longest has {longest}"
        )
    graphdef, _, _ = abstract_model(config)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, np.ndarray] = {}
    size = min(ROWS, _power_of_two(len(prompts)))
    for at in range(0, len(order), size):
        rows = order[at : at + size]
        seeds = np.array(rows + [0] * (size - len(rows)), np.uint32)
        decoded = _decode(
            params,
            _pad([prompts[i] for i in rows], size),
            (np.uint32(seed), seeds),
            graphdef=graphdef,
            max_new=max_new,
            stop_ids=stop_ids,
            sampling=sampling,
        )
        for i, ids in zip(rows, np.asarray(decoded), strict=False):
            ends = np.flatnonzero(np.isin(ids, stop_ids))
            answers[i] = ids[: ends[0]] if ends.size else ids
    return [answers[i] for i in range(len(prompts))]


@partial(jax.jit, static_argnames=("graphdef", "max_new", "stop_ids", "sampling"))
def _decode(
    params: Params,
    prompts: tuple[np.ndarray, np.ndarray],
    seeds: tuple[np.uint32, np.ndarray],
    *,
    graphdef: GraphDef,
    max_new: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
) -> jax.Array:
    """Return int32 [B, max_new], whole on every device; what follows a stop id in a row means nothing.

    `prompts`: tokens, segments; `seeds`: the seed and each row's own.
    """
    model = nnx.merge(graphdef, params)
    tokens_BT, segments_BT = map(jnp.asarray, prompts)
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(seeds[0])))(jnp.asarray(seeds[1]))
    B, T = tokens_BT.shape
    lengths_B = jnp.sum(segments_BT, axis=1)
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    x_BTD, cache = model(tokens_BT, (segments_BT, positions_BT), empty_cache(model.config, B, T + max_new))
    x_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
    ones_B1 = jnp.ones((B, 1), jnp.int32)
    stops = jnp.array(stop_ids, jnp.int32)

    def choose(x_B1D: jax.Array, i: jax.Array) -> jax.Array:
        logits_BV = model.logits(x_B1D)[:, 0]
        return jax.vmap(partial(sample, sampling))(logits_BV, jax.vmap(partial(jax.random.fold_in, data=i))(keys_B))

    def more(carry: Carry) -> jax.Array:
        i, _, _, done_B, _ = carry
        return (i < max_new) & ~jnp.all(done_B)

    def advance(carry: Carry) -> Carry:
        i, x_B1D, out_BM, done_B, cache = carry
        next_B = choose(x_B1D, i)
        out_BM = jax.lax.dynamic_update_slice_in_dim(out_BM, next_B[:, None], i, axis=1)
        x_B1D, cache = model(next_B[:, None], (ones_B1, (lengths_B + i)[:, None]), cache)
        return i + 1, x_B1D, out_BM, done_B | jnp.isin(next_B, stops), cache

    empty_rows_B = lengths_B == 0
    start = (jnp.int32(0), x_B1D, jnp.zeros((B, max_new), jnp.int32), empty_rows_B, cache)
    return constrain(jax.lax.while_loop(more, advance, start)[2], "hidden", "hidden")


def sample(sampling: Sampling, logits_V: jax.Array, key: jax.Array) -> jax.Array:
    """Return one id: the likeliest at temperature 0, else drawn from the softmax over the top_k and the top_p nucleus.

    Nucleus (arXiv 1904.09751): the fewest likeliest tokens whose probabilities reach top_p.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_V).astype(jnp.int32)
    logits_V = logits_V / sampling.temperature
    ranked_V = jnp.sort(logits_V, descending=True)
    if sampling.top_k:
        logits_V = jnp.where(logits_V < ranked_V[sampling.top_k - 1], -jnp.inf, logits_V)
        ranked_V = jnp.where(jnp.arange(ranked_V.size) < sampling.top_k, ranked_V, -jnp.inf)
    if sampling.top_p < 1:
        before_V = jnp.cumsum(jax.nn.softmax(ranked_V)) - jax.nn.softmax(ranked_V)
        least = jnp.min(jnp.where(before_V < sampling.top_p, ranked_V, jnp.inf))
        logits_V = jnp.where(logits_V < least, -jnp.inf, logits_V)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)


def _pad(prompts: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, segments), int32 [rows, T], T the next power of two, so that few shapes are ever compiled."""
    length = max(16, _power_of_two(max(map(len, prompts))))
    tokens, segments = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        segments[row, : len(prompt)] = 1
    return tokens, segments


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`, which is at least 1."""
    return 1 << (max(number, 1) - 1).bit_length()
