"""Packing: nothing lost, nothing doubled, no row too full, and real dialogues fill their rows."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easylm_like.data.conversation import Conversation
from easylm_like.data.encode import Encoded, encode
from easylm_like.data.pack import pack_best_fit
from easylm_like.data.template import KOALA
from easylm_like.data.tokenizer import Tokenizer

lengths_and_row = st.integers(1, 40).flatmap(
    lambda row: st.tuples(st.lists(st.integers(1, row), max_size=60), st.just(row))
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(case=lengths_and_row)
def test_every_record_once_and_no_two_rows_could_be_one(case: tuple[list[int], int]) -> None:
    lengths, row_length = case
    rows = pack_best_fit(lengths, row_length)
    assert Counter(record for row in rows for record in row) == Counter(range(len(lengths)))
    fills = sorted(sum(lengths[record] for record in row) for row in rows)
    assert all(0 < fill <= row_length for fill in fills)
    assert len(fills) < 2 or fills[0] + fills[1] > row_length
    assert pack_best_fit(np.array(lengths, np.int64), row_length) == rows


def test_by_hand() -> None:
    # Longest first into the fullest row that holds it: 6, 5 | then 4 beside the 6, 3 beside the 5, 2 beside 5 and 3.
    assert pack_best_fit([4, 6, 2, 5, 3], 10) == [[1, 0], [3, 4, 2]]
    assert pack_best_fit([], 10) == []
    assert pack_best_fit([10, 10], 10) == [[0], [1]]
    assert pack_best_fit([4, 2, 1, 2], 10, max_records=3) == [[0, 1, 3], [2]]
    assert pack_best_fit([4, 2, 1, 2], 10, max_records=1) == [[0], [1], [3], [2]]


@pytest.mark.parametrize(("lengths", "record"), [([3, 11], 1), ([0], 0), ([5, -1, 99], 1)])
def test_a_length_that_fits_no_row_is_named(lengths: list[int], record: int) -> None:
    with pytest.raises(ValueError, match=f"record {record} has length {lengths[record]}, rows hold 1 to 10"):
        pack_best_fit(lengths, 10)


def test_real_dialogues_fill_their_rows(llama: Tokenizer, dialogues: list[Conversation]) -> None:
    items = [item for item in encode(dialogues, KOALA, llama) if isinstance(item, Encoded)]
    lengths = [len(item.ids) - 1 for item in items if len(item.ids) <= 2049]
    assert len(lengths) == len(dialogues)
    rows = pack_best_fit(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) > 0.99
