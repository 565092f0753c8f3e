"""Feedback, duplicates, limits and prompts that are held out."""

from collections import Counter
from collections.abc import Iterable

from data_prep.config import Feedback
from data_prep.record import Record, Reject
from data_prep.split import shuffle
from data_prep.steps import drop_duplicates, drop_heldout_prompts, keep_feedback, limit_sources
from easylm_like.data.conversation import Conversation, Message, Quality, Role


def conversation(
    name: str, *answers: tuple[str, Quality | None, int], source: str = "s", group: str = ""
) -> Conversation:
    messages: list[Message] = []
    for number, (text, quality, weight) in enumerate(answers):
        messages += [Message(Role.USER, f"q{number}"), Message(Role.ASSISTANT, text, quality, weight)]
    return Conversation(name, source, tuple(messages), group or None)


GOOD = conversation("good", ("a", Quality.GOOD, 1))
BAD = conversation("bad", ("a", Quality.BAD, 1))
MIXED = conversation("mixed", ("a", Quality.BAD, 1), ("b", Quality.GOOD, 1))
CONTEXT = conversation("context", ("a", Quality.BAD, 0), ("b", Quality.GOOD, 1))
PLAIN = conversation("plain", ("a", None, 1))


def kept(records: Iterable[Record]) -> list[str]:
    return [record.id for record in records if isinstance(record, Conversation)]


def test_positive_feedback_takes_out_what_trains_a_bad_answer() -> None:
    records = list(keep_feedback([GOOD, BAD, MIXED, CONTEXT, PLAIN], Feedback.POSITIVE))
    assert kept(records) == ["good", "context", "plain"]
    rejects = [r for r in records if isinstance(r, Reject)]
    assert [(r.where, r.reason) for r in rejects] == [("bad", "bad_answer"), ("mixed", "bad_answer")]
    assert len(kept(keep_feedback([GOOD, BAD, MIXED], Feedback.POSITIVE_AND_NEGATIVE))) == 3


def test_duplicates_are_equal_in_text_quality_and_weight() -> None:
    again = conversation("again", ("a", Quality.GOOD, 1), source="t")
    records = list(drop_duplicates([GOOD, BAD, PLAIN, again, CONTEXT]))
    assert kept(records) == ["good", "bad", "plain", "context"]
    (reject,) = (r for r in records if isinstance(r, Reject))
    assert (reject.source, reject.where, reject.reason, reject.detail) == (
        "t",
        "again",
        "duplicate",
        "same messages as good",
    )


def test_a_limit_keeps_whole_groups_of_its_own_source() -> None:
    pairs = [conversation(f"{i}-{k}", (f"{i}{k}", None, 1), group=f"g{i}") for i in range(100) for k in "ab"]
    others = [conversation(f"o{i}", (f"o{i}", None, 1), source="other") for i in range(30)]
    records = list(limit_sources(pairs + others, {"s": 21, "other": 0}, {"3-a", "3-b"}, seed=0))
    names = kept(records)
    assert len(names) == 20 + 30 + 2  # a 21st would tear a pair; the other source and what is held out are not limited
    assert {"3-a", "3-b"} <= set(names)
    assert set(Counter(name[:-1] for name in names if "-" in name).values()) == {2}
    assert {r.reason for r in records if isinstance(r, Reject)} == {"over_limit"}
    assert names != kept(limit_sources(pairs + others, {"s": 21, "other": 0}, {"3-a", "3-b"}, seed=1))


def test_what_a_limit_chose_is_not_bunched_by_the_shuffle() -> None:
    many = [conversation(f"m{i}", (f"m{i}", None, 1)) for i in range(2000)]
    few = [conversation(f"f{i}", (f"f{i}", None, 1), source="few") for i in range(200)]
    left = [r for r in limit_sources(many + few, {"s": 200, "few": 0}, (), 0) if isinstance(r, Conversation)]
    first_half = Counter(c.source for c in shuffle(left, 0)[:200])
    assert first_half["s"] in range(70, 130)


def test_a_prompt_that_is_held_out_is_not_trained() -> None:
    other = Conversation("other", "t", (Message(Role.USER, "Q0 "), Message(Role.ASSISTANT, "z")))
    elsewhere = Conversation("elsewhere", "t", (Message(Role.USER, "p"), Message(Role.ASSISTANT, "z")))
    records = list(drop_heldout_prompts([GOOD, elsewhere], [other]))
    assert kept(records) == ["elsewhere"]
    assert [r.reason for r in records if isinstance(r, Reject)] == ["prompt_in_heldout"]
