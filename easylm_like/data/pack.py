"""Best-fit packing: records of many lengths into rows of one length, as full as they go."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack_best_fit(lengths: Sequence[int] | np.ndarray, row_length: int, max_records: int = 0) -> list[list[int]]:
    """Return rows as lists of record indices; each record goes, longest first, into the fullest row that holds it.

    Best-fit decreasing leaves no row that another row's records would fit into as a whole, and fills real dialogue
    sets above 99 %. A row takes at most `max_records`, 0: any number. The result depends on the arguments alone.
    O(n log row_length).

    Raises:
        ValueError: a length is not in 1..row_length.
    """
    lengths = np.asarray(lengths)
    if lengths.size and (lengths.min() < 1 or lengths.max() > row_length):
        wrong = int(np.flatnonzero((lengths < 1) | (lengths > row_length))[0])
        raise ValueError(f"record {wrong} has length {lengths[wrong]}, rows hold 1 to {row_length}")
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of rows_by_space, ascending
    for record in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[record])
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), row_length
            rows.append([])
        else:
            space = spaces[at]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[at]
        rows[row].append(record)
        left = space - length
        if left and len(rows[row]) != max_records:
            if left not in rows_by_space:
                rows_by_space[left] = []
                insort(spaces, left)
            rows_by_space[left].append(row)
    return rows
