"""Batches traced back to the records: no two ids of the data set are alike here, so each tells where it is from."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from easylm_like.data.dataset import TokenDataset
from easylm_like.data.loader import Batch, Loader, empty_batch, make_loader

ROW = 32
DTYPES = {"tokens": "int32", "targets": "int32", "weights": "float32", "segments": "int32", "positions": "int32"}


@pytest.fixture(scope="module")
def dataset() -> TokenDataset:
    """Return 57 records of 2 to 33 ids that count from 1 on: id 100 comes after id 99 and nowhere else."""
    random = np.random.default_rng(0)
    sizes = np.append(random.integers(2, ROW + 2, 55), [2, ROW + 1])  # the shortest and the longest there can be
    offsets = np.cumsum([0, *sizes])
    total = int(offsets[-1])
    weights = random.integers(0, 2, total).astype(np.uint8)
    weights[offsets[:-1]] = 0
    ids, names = np.arange(1, total + 1, dtype=np.int32), [str(i) for i in range(len(sizes))]
    return TokenDataset(ids, weights, np.zeros(total, bool), offsets, names, names, {}, "")


Make = Callable[..., Loader]


@pytest.fixture(scope="module")
def make(dataset: TokenDataset) -> Make:
    def loader(batch_size: int = 4, seed: int = 0, **others: int) -> Loader:
        return make_loader(dataset, ROW, batch_size, seed, **others)

    return loader


def batches(loader: Loader, steps: int) -> Batch:
    """Return the batches of the first steps, one below the other."""
    parts = [loader.batch(step) for step in range(steps)]
    return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def test_dtypes_and_shapes_are_the_contracts(make: Make) -> None:
    batch = make().batch(3)
    assert {name: str(array.dtype) for name, array in batch._asdict().items()} == DTYPES
    assert {array.shape for array in batch} == {(4, ROW)}
    empty = empty_batch(3, 5)
    assert {name: str(array.dtype) for name, array in empty._asdict().items()} == DTYPES
    assert all(array.shape == (3, 5) and not array.any() for array in empty)


def test_targets_follow_tokens_in_the_same_record(make: Make, dataset: TokenDataset) -> None:
    batch = batches(make(), 4)
    real = batch.segments > 0
    np.testing.assert_array_equal(batch.targets[real], batch.tokens[real] + 1)
    record = np.searchsorted(dataset.offsets, batch.tokens - 1, side="right") - 1
    assert np.array_equal(np.searchsorted(dataset.offsets, batch.targets - 1, side="right")[real] - 1, record[real])
    np.testing.assert_array_equal(batch.positions[real], (batch.tokens - 1 - dataset.offsets[record])[real])
    np.testing.assert_array_equal(batch.weights[real], dataset.weights[batch.targets[real] - 1])
    for array in batch:
        assert not array[~real].any()


def test_segments_count_the_records_of_a_row(make: Make, dataset: TokenDataset) -> None:
    batch = batches(make(), 4)
    several = 0
    for row, segments in zip(batch.tokens, batch.segments, strict=True):
        real = segments[segments > 0]
        assert np.array_equal(segments[: len(real)], real)  # padding is at the end
        starts = np.flatnonzero(np.diff(real, prepend=0))
        assert np.array_equal(np.diff(real, prepend=0)[starts], np.ones(len(starts)))  # 1, 2, 3, ...
        assert set(row[starts] - 1) <= set(dataset.offsets.tolist())
        several += len(starts) > 1
    assert several > 4


def test_an_epoch_shows_every_row_once_and_every_trained_target(make: Make, dataset: TokenDataset) -> None:
    loader = make(batch_size=1)
    steps = loader.steps_per_epoch
    assert steps == len(loader.rows)
    for epoch in range(2):
        parts = [loader.batch(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        tokens = Counter(token for part in parts for token in part.tokens[part.segments > 0].tolist())
        last = set(dataset.ids[dataset.offsets[1:] - 1].tolist())  # is a target only
        assert tokens == Counter(i for i in dataset.ids.tolist() if i not in last)
        assert sum(part.weights.sum() for part in parts) == dataset.weights.sum()
        numbers = [int(loader.row_numbers(step)[0]) for step in range(epoch * steps, (epoch + 1) * steps)]
        assert sorted(numbers) == list(range(steps))


@pytest.mark.parametrize("batch_size", [3, 4, 7, 1000])
def test_epochs_follow_each_other_without_a_gap(make: Make, batch_size: int) -> None:
    loader = make(batch_size=batch_size)
    n = len(loader.rows)
    assert loader.steps_per_epoch == int(np.ceil(n / batch_size))
    numbers = np.concatenate([loader.row_numbers(step) for step in range(-(-3 * n // batch_size))])
    epochs = [numbers[i * n : (i + 1) * n].tolist() for i in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_is_a_function_of_seed_and_step(make: Make) -> None:
    loader, again = make(), make()
    wanted = [loader.batch(step) for step in range(12)]
    for step in (11, 3, 3, 0):  # in any order, from any loader
        for got, array in zip(again.batch(step), wanted[step], strict=True):
            np.testing.assert_array_equal(got, array)
    assert not np.array_equal(make(seed=1).batch(0).tokens, wanted[0].tokens)
    assert not np.array_equal(wanted[0].tokens, wanted[1].tokens)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_shares_are_the_batch_of_one_host(make: Make, hosts: int, shuffle: bool) -> None:
    alone = make(batch_size=8, shuffle=shuffle)
    shares = [
        make(batch_size=8, shuffle=shuffle, part=range(host * 8 // hosts, (host + 1) * 8 // hosts))
        for host in range(hosts)
    ]
    for step in range(alone.steps_per_epoch + 2):
        parts = [share.batch(step) for share in shares]
        assert {part.tokens.shape for part in parts} == {(8 // hosts, ROW)}
        for array, pieces in zip(alone.batch(step), zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(pieces), array)


def test_unshuffled_shows_every_row_once_and_then_empty_rows(make: Make, dataset: TokenDataset) -> None:
    loader = make(batch_size=5, shuffle=False)
    steps = loader.steps_per_epoch
    numbers = np.concatenate([loader.row_numbers(step) for step in range(steps)])
    n = len(loader.rows)
    assert numbers[:n].tolist() == list(range(n))
    assert (numbers[n:] == -1).all()
    assert n % 5, "no row is left empty, the test shows nothing"
    whole = batches(loader, steps)
    assert whole.weights.sum() == dataset.weights.sum()
    for array in loader.batch(steps):
        assert not array.any()


def test_places_say_which_record_lies_where(make: Make, dataset: TokenDataset) -> None:
    loader = make()
    batch, covered = loader.batch(5), np.zeros((4, ROW), int)
    for row, where, segment, record in loader.places(5):
        covered[row, where] += 1
        first = dataset.offsets[record] + 1
        assert batch.tokens[row, where].tolist() == list(range(first, dataset.offsets[record + 1]))
        assert (batch.segments[row, where] == segment).all()
    np.testing.assert_array_equal(covered, batch.segments > 0)
