"""What is kept of past texts: the longest known beginning is found, the least recently used goes first."""

import jax.numpy as jnp
import numpy as np

from easylm_like.serve.forward import Cache
from easylm_like.serve.prefix import SHORTEST, PrefixStore, common_prefix


def row(size: int = 100) -> Cache:
    """Return a cache row of `size` bytes, as an object of its own."""
    return Cache((jnp.zeros(size // 8, jnp.float32),), (jnp.zeros(size // 8, jnp.float32),))


def text(*parts: int, of: int = SHORTEST) -> np.ndarray:
    return np.repeat(np.array(parts, np.int32), of)


def test_the_longest_known_beginning_is_found() -> None:
    store, rows = PrefixStore(10**6), [row() for _ in range(3)]
    for tokens, kept in zip((text(1, 2), text(1, 3, 4), text(2, 2)), rows, strict=True):
        store.add(tokens, kept)
    assert store.find(text(1, 3, 5)) == (2 * SHORTEST, rows[1])
    assert store.find(text(1, 2, 2)) == (2 * SHORTEST, rows[0])
    assert store.find(text(2)) == (SHORTEST, rows[2])
    for unknown in (text(3, 2), text(1)[:-1], text(1, 2)[1:], np.array([], np.int32)):
        assert store.find(unknown) == (0, None)
    assert store.nbytes == sum(kept.nbytes for kept in rows)


def test_a_text_takes_the_place_of_its_beginnings_and_is_kept_once() -> None:
    store, longer = PrefixStore(10**6), row()
    store.add(text(1, 2), row())
    store.add(text(1, 2, 3), longer)
    store.add(text(1, 2), row())
    store.add(text(1, 2, 3), row())
    assert store.nbytes == longer.nbytes
    assert store.find(text(1, 2)) == (2 * SHORTEST, longer)


def test_the_least_recently_used_goes_first() -> None:
    store = PrefixStore(3 * row().nbytes)
    for first in (1, 2, 3):
        store.add(text(first), row())
    assert store.find(text(1))[0]
    store.add(text(4), row())
    assert [bool(store.find(text(first))[0]) for first in (1, 2, 3, 4)] == [True, False, True, True]
    store.add(text(5), row(400))  # more than all may take together
    assert store.nbytes == 3 * row().nbytes
    store.add(text(6)[1:], row())  # too short to be worth a copy
    assert store.nbytes == 3 * row().nbytes
    store.clear()
    assert (store.nbytes, store.find(text(1))) == (0, (0, None))


def test_common_prefix() -> None:
    assert common_prefix(text(1, 2), text(1, 3)) == SHORTEST
    assert common_prefix(text(1), text(1, 3)) == SHORTEST
    assert common_prefix(text(1), text(2)) == 0
