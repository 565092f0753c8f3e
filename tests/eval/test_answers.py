"""Answers are those that transformers gives with the exported folder; what cannot be asked says why."""

import pytest

from easylm_like.convert.load import LoadedModel
from easylm_like.data.conversation import Conversation, Message, Quality, Role
from easylm_like.errors import UserError
from easylm_like.model.generate import Sampling
from eval.answers import answer, answer_conversations

from .conftest import Transformers

GREEDY = Sampling()
USER, ASSISTANT = Role.USER, Role.ASSISTANT


@pytest.mark.parametrize("quality", Quality)
def test_answers_are_transformers(model: LoadedModel, theirs: Transformers, quality: Quality) -> None:
    questions = ["What is 3 and 4?", "What is 1 and 1? And now?", "Who?"]
    chats = [[Message(USER, question)] for question in questions]
    ours = answer(model, chats, quality, max_new=8, sampling=GREEDY)
    assert ours == [theirs.answer(question, quality.value, 8) for question in questions]
    assert all(ours)


def test_the_last_question_is_asked_and_what_follows_it_is_the_reference(model: LoadedModel) -> None:
    turns = (Message(USER, "Hi"), Message(ASSISTANT, "Hello."), Message(USER, "What is 3 and 4?"))
    asked = [
        Conversation("a", "ann", (*turns, Message(ASSISTANT, "It is 7."))),
        Conversation("b", "bob", turns),
        Conversation("c", "ann", turns[:2]),
    ]
    a, b, c = answer_conversations(model, asked, Quality.BAD, max_new=8, sampling=GREEDY)
    assert (a.id, a.source, a.marker, a.question, a.reference) == ("a", "ann", "bad", "What is 3 and 4?", "It is 7.")
    assert (b.question, b.reference, b.text) == ("What is 3 and 4?", None, a.text)
    assert (c.question, c.reference) == ("Hi", "Hello.")
    assert a.text == answer(model, [turns] * 3, Quality.BAD, max_new=8, sampling=GREEDY)[2]
    assert a.text != c.text
    assert {x.problem for x in (a, b, c)} == {None}


def test_what_cannot_be_asked_says_why_and_the_others_keep_their_places(model: LoadedModel) -> None:
    good = (Message(USER, "What is 3 and 4?"), Message(ASSISTANT, "It is 7."))
    asked = [
        Conversation("long", "s", (Message(USER, "word " * 200), Message(ASSISTANT, "Long."))),
        Conversation("first", "s", good),
        Conversation("mute", "s", (Message(ASSISTANT, "Nobody asked."),)),
        Conversation("system", "s", (Message(Role.SYSTEM, "Be brief."), *good)),
        Conversation("second", "s", good),
        Conversation("eos", "s", (Message(USER, "What is </s>?"), Message(ASSISTANT, "The end."))),
        Conversation("last", "s", good),
    ]
    answers = {a.id: a for a in answer_conversations(model, asked, Quality.GOOD, max_new=8, sampling=GREEDY)}
    assert list(answers) == ["long", "first", "mute", "system", "second", "eos", "last"]
    assert answers["first"].text == answers["second"].text == answers["last"].text
    assert answers["first"].text is not None
    problems = {name: a.problem for name, a in answers.items() if a.problem}
    assert all(answers[name].text is None for name in problems)
    assert "there is room for 120" in problems.pop("long")
    assert problems.pop("mute") == "no user message"
    assert "takes user and assistant in turns, got system" in problems.pop("system")
    assert "special token '</s>'" in problems.pop("eos")
    assert not problems
    assert (answers["long"].reference, answers["mute"].question) == ("Long.", "")


def test_conversations_that_share_an_id_are_not_mixed_up(model: LoadedModel) -> None:
    asked = [
        Conversation("same", "s", (Message(USER, question), Message(ASSISTANT, reference)))
        for question, reference in (("What is 1 and 1?", "It is 2."), ("What is 3 and 4?", "It is 7."), ("Who?", "Me."))
    ]
    first, second, _ = answer_conversations(model, asked, Quality.GOOD, max_new=8, sampling=GREEDY)
    assert (first.question, first.reference) == ("What is 1 and 1?", "It is 2.")
    assert (second.question, second.reference) == ("What is 3 and 4?", "It is 7.")


def test_a_prompt_that_does_not_fit_is_an_error(model: LoadedModel) -> None:
    with pytest.raises(UserError, match="prompts need 1 to 28 ids"):
        answer(model, [[Message(USER, "word " * 20)]], Quality.GOOD, max_new=100, sampling=GREEDY)
