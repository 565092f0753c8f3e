"""Keys and values of texts that were read before: a prompt with the same beginning is read from where it differs.

A chat's next turn begins with its earlier turns, and all chats of an application with one system message.
"""

import time
from dataclasses import dataclass

import numpy as np

from easylm_like.serve.forward import Cache

SHORTEST = 16  # tokens; below that, reading again costs no more than copying


@dataclass(slots=True, eq=False)
class Entry:
    """A text and the cache row that holds it; `row` may be longer than the text."""

    tokens: np.ndarray
    row: Cache
    used: float


class PrefixStore:
    """Rows of past texts, the least recently used given up when together they take more than `limit` bytes.

    A row in it is never changed: who goes on from it copies it first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: list[Entry] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(entry.row.nbytes for entry in self._entries)

    def find(self, tokens: np.ndarray) -> tuple[int, Cache | None]:
        """Return (how many first tokens of `tokens` are known, the row that has them); (0, None) if hardly any are."""
        found = [(common_prefix(entry.tokens, tokens), number) for number, entry in enumerate(self._entries)]
        known, number = max(found, default=(0, 0))
        if known < SHORTEST:
            return 0, None
        self._entries[number].used = time.monotonic()
        return known, self._entries[number].row

    def add(self, tokens: np.ndarray, row: Cache) -> None:
        """Keep the row of a text, in the place of those of its beginnings."""
        if len(tokens) < SHORTEST or row.nbytes > self.limit:
            return
        if any(common_prefix(entry.tokens, tokens) == len(tokens) for entry in self._entries):
            return
        self._entries = [e for e in self._entries if common_prefix(e.tokens, tokens) < len(e.tokens)]
        self._entries.append(Entry(np.array(tokens, np.int32), row, time.monotonic()))
        while self.nbytes > self.limit:
            self._entries.remove(min(self._entries, key=lambda entry: entry.used))

    def clear(self) -> None:
        """Give up every row."""
        self._entries.clear()


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many tokens two texts have in common from their beginning."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if differ.size else length
