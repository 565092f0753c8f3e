"""Text that comes token by token is the text of all tokens, up to a stop string, with real tokenizers."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.serve.text import TextStream, token_bytes

HARD = [
    "Once upon a time 😀 there  was é日本 \n\n\t a </s x <|im_start 👩‍👩‍👧‍👦 end",
    "  two spaces first, and a trailing one ",
    "\x00\x01 control, ﷽, Z̷͉a̴l̶g̵o, ﬁ",
]


@pytest.fixture(
    scope="session", params=["models/stories260K-hf", "models/smollm2-135m-instruct", "tokenizers/hf_llama"]
)
def any_tokenizer(request: pytest.FixtureRequest, shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / request.param)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode([text])[0][0].tolist()


def streamed(tokenizer: Tokenizer, prompt: list[int], answer: list[int], **others: object) -> list[str]:
    stream = TextStream(tokenizer, prompt, **others)
    pieces = []
    for token in answer:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("text", HARD)
def test_the_pieces_are_the_text(any_tokenizer: Tokenizer, text: str) -> None:
    prompt, both = ids_of(any_tokenizer, "A question:"), ids_of(any_tokenizer, "A question:" + text)
    known = next((n for n, pair in enumerate(zip(prompt, both, strict=False)) if pair[0] != pair[1]), len(prompt))
    whole, before = any_tokenizer.decode(both), any_tokenizer.decode(both[:known])
    pieces = streamed(any_tokenizer, both[:known], both[known:])
    assert before + "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", HARD)
def test_the_bytes_of_tokens_are_those_of_the_text(any_tokenizer: Tokenizer, text: str) -> None:
    ids = ids_of(any_tokenizer, text)
    joined = b"".join(token_bytes(any_tokenizer, token) for token in ids)
    assert joined.decode().lstrip(" ") == text.lstrip(" ")  # SentencePiece's dummy space may be one of them
    assert token_bytes(any_tokenizer, any_tokenizer.eos_id).decode() == any_tokenizer.special.eos
    assert token_bytes(any_tokenizer, 10**6) == b""


def test_half_a_character_waits_and_is_told_at_the_end(any_tokenizer: Tokenizer) -> None:
    prompt, ids = ids_of(any_tokenizer, "A:"), ids_of(any_tokenizer, "A: x🦙")[:-1]
    pieces = streamed(any_tokenizer, prompt, ids[len(prompt) :])
    assert "\ufffd" in pieces[-1]
    assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_special_tokens_have_no_text(any_tokenizer: Tokenizer) -> None:
    ids = [*ids_of(any_tokenizer, "a"), any_tokenizer.eos_id, *ids_of(any_tokenizer, "b")]
    assert any_tokenizer.special.eos not in "".join(streamed(any_tokenizer, ids[:1], ids[1:]))


def test_stops_and_gap_act_as_on_the_whole_text(tokenizer: Tokenizer) -> None:
    prompt = ids_of(tokenizer, "Q:")

    @given(
        text=st.text("ab c🦙é\n", min_size=1, max_size=30),
        stops=st.lists(st.text("ab c🦙", min_size=1, max_size=4), max_size=1),
        gap=st.sampled_from(["", " ", "a", "ab"]),
    )
    @settings(deadline=None, max_examples=300)
    def holds(text: str, stops: list[str], gap: str) -> None:
        ids = ids_of(tokenizer, "Q:" + text)[len(prompt) :]
        said = tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :].removeprefix(gap)
        ends = [at for stop in stops if (at := said.find(stop)) >= 0]
        pieces = streamed(tokenizer, prompt, ids, stops=stops, gap=gap)
        assert "".join(pieces) == said[: min(ends, default=len(said))]

    holds()
