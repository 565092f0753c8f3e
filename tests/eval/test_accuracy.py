"""Exact match, and Wilson's interval against published values and scipy's."""

import math

import pytest
from scipy.stats import binomtest

from eval.accuracy import exact_match, wilson
from eval.answers import Answer


def answer(text: str | None, reference: str | None) -> Answer:
    return Answer("id", "source", "good", "question", text, reference)


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_the_published_ones(right: int, asked: int, low: float, high: float) -> None:
    """R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""
    assert wilson(right, asked) == pytest.approx((low, high), abs=5e-5)


def test_intervals_are_scipys() -> None:
    for right, asked in ((0, 1), (1, 1), (3, 7), (50, 50), (999, 1000), (617, 2000)):
        theirs = binomtest(right, asked).proportion_ci(0.95, method="wilson")
        assert wilson(right, asked) == pytest.approx((theirs.low, theirs.high), abs=1e-5)


def test_an_interval_holds_the_share_that_was_seen() -> None:
    cases = [(right, asked) for asked in range(1, 60) for right in range(asked + 1)]
    outside = []
    for right, asked in cases:
        low, high = wilson(right, asked)
        outside += [] if 0.0 <= low <= right / asked <= high <= 1.0 else [(right, asked)]
    assert outside == []


def test_another_confidence() -> None:
    theirs = binomtest(30, 40).proportion_ci(0.99, method="wilson")
    assert wilson(30, 40, z=2.575829) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_whitespace_around_an_answer_does_not_count_and_everything_else_does() -> None:
    given = [
        answer(" Paris.\n", "Paris."),
        answer("paris.", "Paris."),
        answer("Paris", "Paris."),
        answer("a  b", "a b"),
    ]
    result = exact_match(given)
    assert (result.right, result.asked, result.share) == (1, 4, 0.25)
    assert (result.low, result.high) == wilson(1, 4)


def test_what_could_not_be_asked_is_wrong_and_what_has_no_reference_is_not_counted() -> None:
    result = exact_match([answer(None, "Paris."), answer("Paris.", None), answer("", ""), answer(None, None)])
    assert (result.right, result.asked) == (1, 2)


def test_nothing_asked_says_nothing() -> None:
    result = exact_match([])
    assert math.isnan(result.share)
    assert (result.low, result.high) == (0.0, 1.0)
