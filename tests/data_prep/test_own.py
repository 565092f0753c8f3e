"""Our own Conversation JSONL as a source."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.config import Format
from easylm_like.errors import UserError

QUESTION, ANSWER = {"role": "user", "content": " q "}, {"role": "assistant", "content": "a", "quality": "good"}


def test_contents_and_ids_stay_and_the_origin_is_remembered(read: Callable, lines: Callable[..., Path]) -> None:
    path = lines(
        {"id": "x", "source": "ann", "messages": [QUESTION, ANSWER], "group": "g", "meta": {"k": 1}},
        {"id": "y", "source": "set", "messages": [ANSWER]},
        {"id": "z", "source": "set", "messages": [QUESTION, ANSWER | {"weight": 0}]},
        {"id": "w", "source": "set", "messages": [QUESTION, ANSWER | {"content": " "}]},
    )
    (x, y), rejected = read(Format.CONVERSATIONS, path)
    assert (x.id, x.source, x.group, x.meta, x.messages[0].content) == (
        "x",
        "set",
        "g",
        {"origin": "ann", "k": 1},
        " q ",
    )
    assert (y.id, y.meta) == ("y", {})
    assert rejected == Counter(nothing_trained=1, empty=1)


def test_a_line_that_breaks_the_contract_stops_with_its_place(read: Callable, lines: Callable[..., Path]) -> None:
    path = lines({"id": "x", "source": "s", "messages": [QUESTION, ANSWER]}, {"id": "y", "messages": [QUESTION]})
    with pytest.raises(UserError, match=r"rows\.jsonl:2: source must be a string"):
        read(Format.CONVERSATIONS, path)
