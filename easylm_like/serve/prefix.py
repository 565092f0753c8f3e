"""Keys and values of texts that were read before: a prompt with the same beginning is read from where it differs.

A chat's next turn begins with its earlier turns, and all chats of an application with one system message.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from easylm_like.serve.forward import Cache

SHORTEST = 16  # tokens; below that, reading again costs no more than copying


@dataclass(slots=True, eq=False)
class Entry:
    """A text, the cache row that holds it, and its bytes; `row` may be longer than the text."""

    tokens: np.ndarray
    row: Cache
    nbytes: int


class PrefixStore:
    """Rows of past texts, the least recently used given up when together they take more than `limit` bytes.

    A row in it is never changed: who goes on from it copies it first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0  # of all rows
        self._entries: dict[bytes, list[Entry]] = {}  # by their first SHORTEST tokens
        self._used: OrderedDict[Entry, None] = OrderedDict()  # the least recently used first

    def find(self, tokens: np.ndarray) -> tuple[int, Cache | None]:
        """Return (how many first tokens of `tokens` are known, the row that has them); (0, None) if hardly any are."""
        entries = self._entries.get(_key(tokens), [])
        if len(tokens) < SHORTEST or not entries:
            return 0, None
        entry = max(entries, key=lambda entry: common_prefix(entry.tokens, tokens))
        self._used.move_to_end(entry)
        return common_prefix(entry.tokens, tokens), entry.row

    def add(self, tokens: np.ndarray, row: Cache) -> None:
        """Keep the row of a text, in the place of those of its beginnings."""
        size = row.nbytes
        if len(tokens) < SHORTEST or size > self.limit:
            return
        entries = self._entries.setdefault(_key(tokens), [])
        shared = [(entry, common_prefix(entry.tokens, tokens)) for entry in entries]
        if any(common == len(tokens) for _, common in shared):
            return
        entry = Entry(np.array(tokens, np.int32), row, size)
        entries.append(entry)
        self._used[entry] = None
        self.nbytes += size
        for other, common in shared:
            if common == len(other.tokens):
                self._remove(other)
        while self.nbytes > self.limit:
            self._remove(next(iter(self._used)))

    def clear(self) -> None:
        """Give up every row."""
        self._entries.clear()
        self._used.clear()
        self.nbytes = 0

    def _remove(self, entry: Entry) -> None:
        key = _key(entry.tokens)
        self._entries[key].remove(entry)
        if not self._entries[key]:
            del self._entries[key]
        del self._used[entry]
        self.nbytes -= entry.nbytes


def _key(tokens: np.ndarray) -> bytes:
    return np.asarray(tokens[:SHORTEST], np.int32).tobytes()


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many tokens two texts have in common from their beginning."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if differ.size else length
