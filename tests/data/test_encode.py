"""Ids and loss weights of whole conversations: an EOS is trained after every trained answer and nowhere else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf_tokenizers
from sentencepiece import SentencePieceProcessor

from easylm_like.data.conversation import Conversation, Message, Quality, Role
from easylm_like.data.encode import Encoded, Rejected, encode
from easylm_like.data.template import KOALA, PLAIN, Why
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer

from .conftest import TOKENIZERS

Talk = Callable[..., Conversation]


def only(conversation: Conversation, tokenizer: Tokenizer) -> Encoded | Rejected:
    (item,) = encode([conversation], KOALA, tokenizer)
    return item


def encoded(conversation: Conversation, tokenizer: Tokenizer) -> Encoded:
    item = only(conversation, tokenizer)
    assert isinstance(item, Encoded), item
    return item


def test_ids_and_weights_by_hand(llama: Tokenizer, sentencepiece_llama: SentencePieceProcessor, talk: Talk) -> None:
    item = encoded(talk("Hello!", "Hi, I am fine.", "And you?", "So so."), llama)
    sp = sentencepiece_llama.encode
    parts = [
        ([1, *sp("BEGINNING OF CONVERSATION: USER: Hello! GPT:")], 0),
        ([*sp("Hi, I am fine."), 2], 1),
        (sp("USER: And you? GPT:"), 0),
        ([*sp("So so."), 2], 1),
    ]
    assert item.ids.tolist() == [number for ids, _ in parts for number in ids]
    assert item.weights.tolist() == [weight for ids, weight in parts for _ in ids]
    assert (item.ids.dtype, item.weights.dtype, item.span_of.dtype) == (np.int32, np.uint8, np.int32)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_trained_answer_ends_in_one_trained_eos(
    tokenizers: dict[str, Tokenizer], dialogues: list[Conversation], name: str
) -> None:
    tokenizer = tokenizers[name]
    for item in encode(dialogues[:300], KOALA, tokenizer):
        assert isinstance(item, Encoded)
        is_eos = item.ids == tokenizer.eos_id
        assert is_eos.sum() == len(item.conversation.messages) // 2
        assert item.weights[is_eos].all()
        follows = np.flatnonzero(is_eos)[:-1] + 1  # the next turn's first token
        assert not item.weights[follows].any()
        assert (item.ids[0], item.weights[0]) == (tokenizer.bos_id, 0)
        # What is trained, decoded, is the answers; the rest holds the questions.
        trained = "".join(tokenizer.decode([i]) for i in item.ids[(item.weights == 1) & ~is_eos])
        words = "".join(m.content for m in item.conversation.messages if m.role == Role.ASSISTANT)
        if words.isascii():  # a character of several tokens does not decode token by token
            assert "".join(trained.split()) == "".join(words.split())


def test_spans_of_tokens_say_why(llama: Tokenizer, talk: Talk) -> None:
    item = encoded(talk("Hello!", "Hi."), llama)
    why = [item.spans[i].why for i in item.span_of]
    assert why[-1] == Why.TERMINATOR
    assert set(why) == {Why.SCAFFOLD, Why.CONTEXT, Why.ANSWER, Why.TERMINATOR}
    texts = {w: llama.decode([int(i) for i, of in zip(item.ids, why, strict=True) if of == w]) for w in set(why)}
    assert (texts[Why.ANSWER], texts[Why.TERMINATOR]) == ("Hi.", "</s>")


def test_an_untrained_answer_has_an_untrained_eos(llama: Tokenizer, talk: Talk) -> None:
    conversation = talk("a", "one", "b", "two")
    messages = list(conversation.messages)
    messages[1] = replace(messages[1], weight=0, quality=Quality.BAD)
    item = encoded(replace(conversation, messages=tuple(messages)), llama)
    whole = encoded(conversation, llama)
    is_eos = item.ids == llama.eos_id
    assert item.weights[is_eos].tolist() == [0, 1]
    assert item.weights.sum() == llama.encode(["two"])[0][0].size + 1
    assert whole.weights.sum() == item.weights.sum() + llama.encode(["one"])[0][0].size + 1
    first, last = np.flatnonzero(item.bad())[[0, -1]]
    assert llama.decode(item.ids[first : last + 1].tolist()) == "one</s>"
    assert not whole.bad().any()


def test_a_document_is_trained_as_a_whole_but_for_its_first_token(tokenizers: dict[str, Tokenizer]) -> None:
    document = Conversation("d", "s", (Message(Role.ASSISTANT, "Once upon a time"),))
    for tokenizer in tokenizers.values():
        (item,) = encode([document], PLAIN, tokenizer)
        assert isinstance(item, Encoded)
        assert item.weights.tolist() == [0] + [1] * (len(item.ids) - 1)
        assert (item.ids[0], item.ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)


def test_what_cannot_be_trained_is_rejected_with_a_reason(llama: Tokenizer, talk: Talk) -> None:
    untrained = replace(talk("q", "a"), messages=(Message(Role.USER, "q"), Message(Role.ASSISTANT, "a", None, 0)))
    cases = [
        (talk("q", ""), "empty_answer", "an assistant message is empty"),
        (talk("q", "a</s>b"), "special_token", "a message contains the special token '</s>'"),
        (talk("<unk>", "a"), "special_token", "a message contains the special token '<unk>'"),
        (talk("q", "a", "unanswered", "b", "c"), None, ""),
        (talk("only a question"), "nothing_trained", "no assistant message of weight 1"),
        (untrained, "nothing_trained", "no assistant message of weight 1"),
        (Conversation("c", "s", (Message(Role.SYSTEM, "s"), *talk("q", "a").messages)), "roles", "takes user and"),
    ]
    for (conversation, reason, sentence), item in zip(
        cases, encode([case[0] for case in cases], KOALA, llama), strict=True
    ):
        assert item.conversation is conversation
        assert (item.reason if isinstance(item, Rejected) else None) == reason
        assert sentence in (item.detail if isinstance(item, Rejected) else "")


def test_order_is_kept_across_batches(llama: Tokenizer, talk: Talk) -> None:
    stream = (talk("q", "" if i % 7 == 0 else f"answer {i}", id=str(i)) for i in range(600))
    items = list(encode(stream, KOALA, llama))
    assert [item.conversation.id for item in items] == [str(i) for i in range(600)]
    assert [i for i, item in enumerate(items) if isinstance(item, Rejected)] == list(range(0, 600, 7))
    assert "answer 599" in llama.decode(items[599].ids.tolist())


@pytest.fixture
def joining(tmp_path: Path) -> Callable[..., Tokenizer]:
    """Return a function that makes a tokenizer of single characters with the given merges and special tokens."""

    def make(*merges: tuple[str, str], special: tuple[str, ...] = ("<s>", "</s>")) -> Tokenizer:
        characters = sorted({chr(i) for i in range(32, 127)})
        pieces = ["<s>", "</s>", *characters, *("".join(merge) for merge in merges)]
        model = hf_tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges))
        backend = hf_tokenizers.Tokenizer(model)
        backend.add_special_tokens([hf_tokenizers.AddedToken(text, normalized=False) for text in special])
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        return load_tokenizer(tmp_path)

    return make


def test_a_token_across_the_border_of_an_answer_is_rejected(joining: Callable[..., Tokenizer], talk: Talk) -> None:
    item = only(talk("q", "a"), joining(("T", ":"), (":", " "), ("T:", " ")))
    assert isinstance(item, Rejected)
    assert (item.reason, item.detail) == ("straddling_token", "token 'T: ' lies across the border of an answer")


def test_a_token_across_other_borders_is_none_of_our_business(joining: Callable[..., Tokenizer], talk: Talk) -> None:
    tokenizer = joining((" ", "G"), ("q", " G"), (" ", "a"))  # user's words with the marker; the gap with the answer
    item = encoded(talk("q", "a", "q", "ab"), tokenizer)
    tokens = [tokenizer.backend.id_to_token(i) for i in item.ids.tolist()]
    assert [t for t, w in zip(tokens, item.weights, strict=True) if w] == [" a", "</s>", " a", "b", "</s>"]
    assert "q G" in tokens


def test_a_bos_or_eos_that_is_not_one_id_is_rejected(joining: Callable[..., Tokenizer], talk: Talk) -> None:
    for special, lost in ((("<s>",), "</s>"), (("</s>",), "<s>")):  # in the vocabulary, but never matched in a text
        item = only(talk("q", "a"), joining(special=special))
        assert isinstance(item, Rejected)
        assert item.reason == "special_token_lost"
        assert repr(lost) in item.detail


def test_one_token_may_begin_and_end(tokenizers: dict[str, Tokenizer], talk: Talk) -> None:
    """SmolLM2's and GPT-2's base models have one token for both."""
    both = replace(tokenizers["smollm2"].special, bos="<|im_end|>")
    tokenizer = replace(tokenizers["smollm2"], special=both)
    assert tokenizer.bos_id == tokenizer.eos_id
    item = encoded(talk("Hello!", "Hi.", "And you?", "So so."), tokenizer)
    at = np.flatnonzero(item.ids == tokenizer.eos_id)
    assert (at[0], at[-1], len(at)) == (0, len(item.ids) - 1, 3)
    assert item.weights[at].tolist() == [0, 1, 1]
    document = Conversation("d", "test", (Message(Role.ASSISTANT, "Once upon a time."),))
    (plain,) = encode([document], PLAIN, tokenizer)
    assert isinstance(plain, Encoded)
    assert plain.weights.tolist() == [0] + [1] * (len(plain.ids) - 1)
