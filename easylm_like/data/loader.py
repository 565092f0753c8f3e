"""Rows -> batches: the batch of a step is a function of (data set, seed, step) and nothing else.

The state of the loader is therefore the step itself: a resumed run asks for the next integer. Every host builds only
its own rows of the global batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from easylm_like.data.dataset import TokenDataset
from easylm_like.data.pack import pack_best_fit


class Batch(NamedTuple):
    """The Batch contract, [B, T] each. A step's loss is sum(weights * nll) / sum(weights) over the global batch."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32, the next token of the same record
    weights: np.ndarray  # float32
    segments: np.ndarray  # int32, 0 = padding, 1.. = the records of a row
    positions: np.ndarray  # int32, start again at 0 in every record


@dataclass(frozen=True, slots=True)
class Loader:
    """Packed rows of a data set, in an order that the seed fixes. `shuffle` False walks once through them in order.

    `part` says which rows of each global batch are made here: those that this host's devices hold.
    """

    dataset: TokenDataset
    rows: list[list[int]]
    row_length: int
    batch_size: int  # rows in a global batch
    seed: int
    shuffle: bool
    part: range

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches that show every row once (the last one may begin the next epoch)."""
        return -(-len(self.rows) // self.batch_size)

    def row_numbers(self, step: int) -> np.ndarray:
        """Return int64 [rows of `part`]: which rows step `step` takes; -1 is an empty row."""
        wanted = step * self.batch_size + np.asarray(self.part, np.int64)
        if not self.shuffle:
            return np.where(wanted < len(self.rows), wanted, -1)
        epochs = wanted // len(self.rows)
        orders = {int(e): np.random.default_rng([self.seed, int(e)]).permutation(len(self.rows)) for e in set(epochs)}
        return np.array([orders[int(e)][w % len(self.rows)] for e, w in zip(epochs, wanted, strict=True)])

    def places(self, step: int) -> Iterator[tuple[int, slice, int, int]]:
        """Yield (row of `part`, where in it, segment, record) for every record in the batch of `step`."""
        for b, row in enumerate(self.row_numbers(step)):
            start = 0
            for segment, record in enumerate(self.rows[row] if row >= 0 else [], start=1):
                stop = start + int(self.dataset.offsets[record + 1] - self.dataset.offsets[record]) - 1
                yield b, slice(start, stop), segment, record
                start = stop

    def whole(self) -> "Loader":
        """Return the loader of all rows of the global batch."""
        return replace(self, part=range(self.batch_size))

    def batch(self, step: int) -> Batch:
        """Return the rows of `part` of the global batch of `step`."""
        batch = empty_batch(len(self.part), self.row_length)
        for b, where, segment, record in self.places(step):
            span = slice(self.dataset.offsets[record], self.dataset.offsets[record + 1])
            ids, weights = self.dataset.ids[span], self.dataset.weights[span]
            batch.tokens[b, where] = ids[:-1]
            batch.targets[b, where] = ids[1:]
            batch.weights[b, where] = weights[1:]
            batch.segments[b, where] = segment
            batch.positions[b, where] = np.arange(len(ids) - 1)
        return batch


def make_loader(
    dataset: TokenDataset,
    row_length: int,
    batch_size: int,
    seed: int,
    *,
    shuffle: bool = True,
    max_records: int = 0,
    part: range | None = None,
) -> Loader:
    """Pack `dataset` and return its loader; `part` are the rows of a global batch that this host makes, or all."""
    rows = pack_best_fit(dataset.lengths(), row_length, max_records)
    return Loader(dataset, rows, row_length, batch_size, seed, shuffle, range(batch_size) if part is None else part)


def empty_batch(rows: int, row_length: int) -> Batch:
    """Return a batch of padding, zeros of the contract's dtypes."""

    def zeros(dtype: type) -> np.ndarray:
        return np.zeros((rows, row_length), dtype)

    return Batch(zeros(np.int32), zeros(np.int32), zeros(np.float32), zeros(np.int32), zeros(np.int32))
