"""Tokenizers into a GGUF file's metadata and out again: the same ids, or a sentence."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import sentencepiece
import transformers

from easylm_like.convert.gguf.tokenizer import tokenizer_from_metadata
from easylm_like.convert.gguf.vocabulary import tokenizer_to_metadata
from easylm_like.convert.pieces import Piece
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.errors import UserError

HARD = [
    "",
    " ",
    "Hello   world,  1234 times 3.14\tand\n\n\nnew\r\nlines ",
    "I'm sure they'LL say DON'T; naïve café, ЖЗИ, 你好。東京 한국어",
    "🚀🙂 ▁ Ġ <0x0A> [PAD400] def f(x):\n    return x**2",
]


def ids(tokenizer: Tokenizer | None, texts: list[str]) -> list[list[int]]:
    assert tokenizer is not None
    return [row.tolist() for row, _ in tokenizer.encode(texts)]


@pytest.fixture(scope="session")
def smollm2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "models" / "smollm2-135m-instruct")


def test_a_sentencepiece_model_comes_back_as_it_was(shared_data: Path) -> None:
    path = shared_data / "tokenizers" / "llama_tokenizer.model"
    tokenizer, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    told = tokenizer_to_metadata(tokenizer, 32064, [])
    assert told["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert told["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert told["tokenizer.ggml.tokens"][-1] == "[PAD32063]"
    assert told["tokenizer.ggml.token_type"][-64:] == [gguf.TokenType.UNUSED] * 64
    assert told["tokenizer.ggml.scores"][:32000] == [theirs.get_score(i) for i in range(32000)]
    back = tokenizer_from_metadata(told, "m.gguf")
    assert back is not None
    assert back.files["tokenizer.json"] == tokenizer.files["tokenizer.json"]
    assert back.special == tokenizer.special
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=back.files["tokenizer.model"])
    assert rebuilt.encode(HARD) == theirs.encode(HARD) == ids(back, HARD)


def test_a_tokenizer_json_alone_gets_scores_that_merge_as_it_does(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "hf_llama")
    assert "tokenizer.model" not in tokenizer.files
    back = tokenizer_from_metadata(tokenizer_to_metadata(tokenizer, 32000, []), "m.gguf")
    assert back is not None
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=back.files["tokenizer.model"])
    original = sentencepiece.SentencePieceProcessor(
        model_file=str(shared_data / "tokenizers" / "llama_tokenizer.model")
    )
    assert rebuilt.encode(HARD) == original.encode(HARD) == ids(back, HARD)


def test_merges_that_no_scores_give_are_refused(tokenizer: Tokenizer) -> None:
    fields = json.loads(tokenizer.files["tokenizer.json"])
    merges = fields["model"]["merges"]
    config = {"tokenizer_config.json": tokenizer.files["tokenizer_config.json"]}
    moved = [*merges, merges[5]]
    for wrong, sentence in ((moved, "at several places"), (merges[1:], "differs in 1 merges")):
        fields["model"]["merges"] = wrong
        files = {"tokenizer.json": json.dumps(fields).encode()}
        with pytest.raises(UserError, match=f"not made from a SentencePiece model.*{sentence}"):
            tokenizer_to_metadata(dataclasses.replace(tokenizer, files=config | files), 384, [])


def test_a_real_byte_level_tokenizer_comes_back(smollm2: Tokenizer) -> None:
    texts = [*HARD, "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>"]
    told = tokenizer_to_metadata(smollm2, 49152, [0])
    back = tokenizer_from_metadata(told, "m.gguf")
    assert back is not None
    assert ids(back, texts) == ids(smollm2, texts)
    assert back.special == smollm2.special
    assert (told["tokenizer.ggml.eos_token_id"], told["tokenizer.ggml.eot_token_id"]) == (2, 0)
    assert told["tokenizer.ggml.add_bos_token"] is False


def test_tokenizers_of_transformers_own_classes_are_recognised(qwen_tokenizer: Tokenizer, tmp_path: Path) -> None:
    gpt2 = transformers.GPT2Tokenizer().train_new_from_iterator(HARD, 300)
    gpt2.save_pretrained(tmp_path)
    for tokenizer, pre in ((qwen_tokenizer, "qwen2"), (load_tokenizer(tmp_path), "gpt-2")):
        told = tokenizer_to_metadata(tokenizer, 500, [])
        assert told["tokenizer.ggml.pre"] == pre
        assert ids(tokenizer_from_metadata(told, "m.gguf"), HARD) == ids(tokenizer, HARD)


def added(tokenizer: Tokenizer, **flags: bool) -> Tokenizer:
    """Return a tokenizer with one more token, "<tool>"."""
    fields = json.loads(tokenizer.files["tokenizer.json"])
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    fields["added_tokens"].append({"id": tokenizer.vocab_size, "content": "<tool>"} | usual | flags)
    files = {**tokenizer.files, "tokenizer.json": json.dumps(fields).encode()}
    return dataclasses.replace(tokenizer, backend=type(tokenizer.backend).from_str(json.dumps(fields)), files=files)


@pytest.mark.parametrize("special", [True, False])
def test_tokens_added_later_stay_whole(special: bool, tokenizer: Tokenizer, qwen_tokenizer: Tokenizer) -> None:
    for before in (tokenizer, qwen_tokenizer):
        own = added(before, special=special)
        told = tokenizer_to_metadata(own, own.vocab_size + 3, [])
        kind = Piece.CONTROL if special else Piece.USER_DEFINED
        assert told["tokenizer.ggml.token_type"][before.vocab_size :] == [kind, *[Piece.UNUSED] * 3]
        back = tokenizer_from_metadata(told, "m.gguf")
        assert back is not None
        assert ids(back, ["a<tool> b", "<tool>"]) == ids(own, ["a<tool> b", "<tool>"])
        assert ("<tool>" in back.special.reserved) == special
        assert back.vocab_size == own.vocab_size


READ_WRONG: dict[str, tuple[dict[str, object], str]] = {
    "another kind": ({"model": "t5"}, "of the kind 't5'; give the model's own with --tokenizer=DIR"),
    "another cut": ({"pre": "tekken"}, "pre is 'tekken'.*--tokenizer=DIR"),
    "no cut": ({"pre": None}, "pre is None.*--tokenizer=DIR"),
    "no merges": ({"merges": None}, "lacks its merges"),
    "no types": ({"token_type": None}, "lacks its tokens or their types"),
    "no end": ({"eos_token_id": None}, "answers could not end"),
    "strange merges": ({"merges": ["qqq zzz"]}, "tokenizer inside is damaged"),
}


@pytest.mark.parametrize("name", READ_WRONG)
def test_a_tokenizer_that_cannot_be_read_is_told(name: str, qwen_tokenizer: Tokenizer) -> None:
    changes, sentence = READ_WRONG[name]
    told = tokenizer_to_metadata(qwen_tokenizer, 500, [])
    told |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(UserError, match=sentence):
        tokenizer_from_metadata({key: value for key, value in told.items() if value is not None}, "m.gguf")


def change(tokenizer: Tokenizer, alter: Callable[[dict[str, object]], object]) -> Tokenizer:
    fields = json.loads(tokenizer.files["tokenizer.json"])
    alter(fields)
    return dataclasses.replace(tokenizer, files={**tokenizer.files, "tokenizer.json": json.dumps(fields).encode()})


def test_what_a_file_cannot_say_is_refused(tokenizer: Tokenizer, qwen_tokenizer: Tokenizer) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    spaceless = {"normalizer": None, "pre_tokenizer": metaspace}
    wrong: list[tuple[Tokenizer, int, list[int], str]] = [
        (tokenizer, 300, [], "384 tokens, the model 300 rows"),
        (tokenizer, 384, [5, 6, 7], "room for two ids"),
        (added(tokenizer, lstrip=True), 400, [], "takes spaces or words around it: <tool>"),
        (change(qwen_tokenizer, lambda f: f.update(pre_tokenizer=byte_level)), 500, [], "no name for"),
        (change(qwen_tokenizer, lambda f: f.update(normalizer=None)), 500, [], "no name for"),
        (change(tokenizer, lambda f: f.update(spaceless)), 400, [], "puts no space before"),
        (change(tokenizer, lambda f: f["model"]["vocab"].update(zzz=350)), 400, [], "differ in 1 tokens, 'zzz'"),
    ]
    for own, size, stops, sentence in wrong:
        with pytest.raises(UserError, match=sentence):
            tokenizer_to_metadata(own, size, stops)
    told = tokenizer_to_metadata(tokenizer, 384, []) | {"tokenizer.ggml.add_space_prefix": False}
    with pytest.raises(UserError, match="puts no space before a text"):
        tokenizer_from_metadata(told, "m.gguf")
    assert tokenizer_from_metadata({"tokenizer.ggml.model": "none"}, "m.gguf") is None
