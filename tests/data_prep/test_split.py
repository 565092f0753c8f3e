"""Seeded choices: stable, even, independent of each other."""

from collections import Counter

from data_prep.split import prompt_key, seeded_fraction, shuffle, split_heldout
from easylm_like.data.conversation import Conversation, Message, Role


def conversation(name: str, prompt: str, source: str = "s") -> Conversation:
    return Conversation(name, source, (Message(Role.USER, prompt), Message(Role.ASSISTANT, f"answer {name}")))


MANY = [conversation(str(i), f"prompt {i // 2}") for i in range(4000)]


def test_fractions_are_even_and_fixed_for_all_time() -> None:
    tenths = Counter(int(10 * seeded_fraction(0, "split", str(i))) for i in range(10_000))
    assert min(tenths.values()) > 850
    assert max(tenths.values()) < 1150
    # Computed with b2sum -l 64. Another value would move conversations between train and heldout of every old set.
    assert seeded_fraction(0, "split", "hi") == 0.9844490620084193


def test_a_prompt_is_the_same_in_other_case_width_and_spacing() -> None:
    keys = {prompt_key(conversation("x", text)) for text in ("Hi  there", "hi\nTHERE ", "\uff48\uff49 there")}
    assert keys == {"hi there"}
    answer = Message(Role.ASSISTANT, "No question")
    assert prompt_key(Conversation("x", "s", (Message(Role.SYSTEM, "Be brief"), answer))) == "be brief"
    assert prompt_key(Conversation("x", "s", (Message(Role.SYSTEM, "A"), Message(Role.USER, "B"), answer))) == "b"


def test_heldout_is_about_the_fraction_whole_prompts_and_another_one_for_another_seed() -> None:
    train, heldout = split_heldout(MANY, (), {"s": 0.1}, seed=0)
    assert 320 < len(heldout) < 480
    assert len(train) + len(heldout) == len(MANY)
    assert not {prompt_key(c) for c in train} & {prompt_key(c) for c in heldout}
    _, other = split_heldout(MANY, (), {"s": 0.1}, seed=1)
    assert len({c.id for c in other} & {c.id for c in heldout}) < 100


def test_own_heldout_ids_are_held_out_whatever_the_fraction() -> None:
    _, heldout = split_heldout(MANY, {"7", "9"}, {"s": 0.0}, seed=0)
    assert [c.id for c in heldout] == ["7", "9"]


def test_a_shuffle_depends_on_the_seed_and_not_on_the_order_before() -> None:
    first = shuffle(MANY, 0)
    assert first == shuffle(MANY[::-1], 0)
    assert sorted(c.id for c in first) == sorted(c.id for c in MANY)
    assert first != shuffle(MANY, 1)
    assert first[:50] != MANY[:50]
