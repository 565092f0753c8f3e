"""HC3: one conversation an answer, with who wrote it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from data_prep.config import Format


def test_real_files(read: Callable, shared_data: Path) -> None:
    conversations, rejected = read(Format.HC3, shared_data / "hc3" / "hc3_600.jsonl")
    assert (len(conversations), rejected) == (1200, Counter())
    assert Counter(c.meta["by"] for c in conversations) == Counter(human=600, chatgpt=600)
    assert set(Counter(c.group for c in conversations).values()) == {2}
    native, _ = read(Format.HC3, shared_data / "hc3" / "hc3_native_wiki_csai_1row.jsonl")
    assert [c.id for c in native] == ["set-0-human-0", "set-0-chatgpt-0"]
    assert {c.messages[0].content for c in native} == {'Please explain what is "Animal cognition"'}
    assert native[1].messages[1].content.startswith("Animal cognition refers to the mental capacities")
    assert {m.quality for c in native for m in c.messages} == {None}


def test_an_empty_answer_is_rejected_alone(read: Callable, lines: Callable[..., Path]) -> None:
    path = lines(
        {"question": "q", "human_answers": ["a", " ", "b"], "chatgpt_answers": []},
        {"question": "q", "human_answers": [], "chatgpt_answers": []},
        {"question": "", "human_answers": ["a"], "chatgpt_answers": []},
    )
    conversations, rejected = read(Format.HC3, path)
    assert [(c.id, c.group) for c in conversations] == [("set-0-human-0", "set-0"), ("set-0-human-2", "set-0")]
    assert rejected == Counter(empty=2, no_answer=1)
