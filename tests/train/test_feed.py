"""Batches come in order, one ahead, and neither an error nor an early end leaves a thread behind."""

import threading
import time

import pytest

from easylm_like.train.feed import prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_every_number_once_in_order() -> None:
    assert [item for item, _ in prefetch(lambda number: number**2, range(3, 7))] == [9, 16, 25, 36]
    assert list(prefetch(str, range(2, 2))) == []
    assert threads() == []


def test_the_next_item_is_made_while_one_is_used_and_no_further_one() -> None:
    began = [threading.Event() for _ in range(4)]
    feed = prefetch(lambda number: began[number].set(), range(4))
    next(feed)
    assert began[1].wait(60)
    assert not began[2].is_set()
    feed.close()
    assert threads() == []
    assert not began[2].is_set()


def test_waiting_is_told() -> None:
    _, waited = next(feed := prefetch(lambda number: time.sleep(0.05), range(1)))
    assert 0.04 < waited < 60
    feed.close()


def test_an_error_comes_when_it_is_the_numbers_turn() -> None:
    def load(number: int) -> int:
        if number == 2:
            raise OSError("the disk is gone")
        return number

    feed = prefetch(load, range(5))
    assert [next(feed)[0], next(feed)[0]] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(feed)
    assert threads() == []
