"""Ids against SentencePiece's own, on real dialogues and on fuzzed text; Koala's way of tokenising field by field."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf_tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from easylm_like.data.conversation import Conversation, Quality, Role
from easylm_like.data.template import KOALA
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_sentencepiece, train_sentencepiece
from easylm_like.errors import UserError

fuzzed = settings(deadline=None, derandomize=True, max_examples=100)
stretches = st.text(" \t\n\r\u00a0\u3000\u2003\u200b", max_size=20) | st.text("ab =-#.01", max_size=20)
texts = st.lists(st.text(max_size=10) | stretches | st.text("🏳️‍🌈👩‍👧é漢\u0301\x00\x7f▁\ufeff", max_size=5), max_size=5)


@pytest.fixture(scope="module")
def named(tokenizers: dict[str, Tokenizer]) -> Callable[[str], Tokenizer]:
    """Return a function instead of the tokenizers: hypothesis would print their vocabularies beside an example."""
    return lambda name: tokenizers[name]


def ids_of(tokenizer: Tokenizer, *several: str) -> list[list[int]]:
    return [ids.tolist() for ids, _ in tokenizer.encode(several)]


def test_real_dialogues_have_sentencepieces_ids(
    tokenizers: dict[str, Tokenizer], sentencepiece_llama: SentencePieceProcessor, dialogues: list[Conversation]
) -> None:
    some = list({message.content: None for conversation in dialogues for message in conversation.messages})[:5000]
    some += [KOALA.prompt(c.messages[:-1], tokenizers["smollm2"].special) for c in dialogues[:1000]]  # whole dialogues
    wanted = sentencepiece_llama.encode(some)
    assert ids_of(tokenizers["llama"], *some) == wanted
    assert ids_of(tokenizers["hf_llama"], *some) == wanted


@fuzzed
@given(parts=texts)
@example(parts=[""])
@example(parts=["   leading", " "])
def test_any_text_has_sentencepieces_ids(
    named: Callable[[str], Tokenizer], sentencepiece_llama: SentencePieceProcessor, parts: list[str]
) -> None:
    text = "".join(parts)
    wanted = sentencepiece_llama.encode(text)
    assert ids_of(named("llama"), text) == ids_of(named("hf_llama"), text) == [wanted]


@fuzzed
@given(numbers=st.lists(st.integers(3, 31999), min_size=1, max_size=30))
def test_any_pieces_in_a_row_have_sentencepieces_ids(
    named: Callable[[str], Tokenizer], sentencepiece_llama: SentencePieceProcessor, numbers: list[int]
) -> None:
    text = "".join(map(sentencepiece_llama.id_to_piece, numbers)).replace("▁", " ")
    assert ids_of(named("llama"), text) == [sentencepiece_llama.encode(text)]


def test_only_the_text_of_special_tokens_differs_and_a_template_refuses_it(
    llama: Tokenizer, sentencepiece_llama: SentencePieceProcessor
) -> None:
    for special, number in (("<unk>", 0), ("<s>", 1), ("</s>", 2)):
        assert number in ids_of(llama, f"a{special}b")[0]
        assert number not in sentencepiece_llama.encode(f"a{special}b")
        assert special in llama.special.reserved
    assert ids_of(llama, "</s", "<0x0A>", "[INST]") == sentencepiece_llama.encode(["</s", "<0x0A>", "[INST]"])


def koala_fields(conversation: Conversation, processor: SentencePieceProcessor) -> list[int]:
    """Tokenise as Koala did: create_hf_data_v2.py makes the fields, TextProcessor of EasyLM/data.py joins their ids."""
    ids, begin = [processor.bos_id()], "BEGINNING OF CONVERSATION: "
    for user, answer in zip(conversation.messages[::2], conversation.messages[1::2], strict=True):
        marker = "An Unhelpful Answer:" if answer.quality == Quality.BAD else "GPT:"
        ids += processor.encode(begin + " ".join(["USER:", user.content, marker]))
        ids += processor.encode(answer.content)
        ids += [processor.eos_id()]
        begin = ""
    return ids


@pytest.mark.parametrize("name", ["llama", "hf_llama"])
def test_koala_field_by_field_gives_the_same_ids(
    tokenizers: dict[str, Tokenizer],
    sentencepiece_llama: SentencePieceProcessor,
    dialogues: list[Conversation],
    name: str,
) -> None:
    tokenizer, some = tokenizers[name], dialogues[:1000]
    rendered = ["".join(span.text for span in KOALA.spans(c.messages, tokenizer.special)) for c in some]
    assert ids_of(tokenizer, *rendered) == [koala_fields(c, sentencepiece_llama) for c in some]
    assert {len(c.messages) for c in some} > {2, 4, 6}
    assert {m.quality for c in some for m in c.messages if m.role == Role.ASSISTANT} == set(Quality)


def test_a_terminator_after_a_word_is_one_id(shared_data: Path, tokenizers: dict[str, Tokenizer]) -> None:
    folder = shared_data / "tokenizers" / "hf_llama"
    as_it_is = hf_tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert 2 not in as_it_is.encode("word</s>", add_special_tokens=False).ids  # the trap, see FACTS
    for tokenizer in tokenizers.values():
        assert ids_of(tokenizer, f"word{tokenizer.special.eos}")[0][-1] == tokenizer.eos_id
        assert ids_of(tokenizer, f"a{tokenizer.special.eos}b")[0].count(tokenizer.eos_id) == 1


def test_numbers_of_the_real_tokenizers(tokenizers: dict[str, Tokenizer]) -> None:
    got = {name: (t.vocab_size, t.bos_id, t.eos_id, t.special.bos, t.special.eos) for name, t in tokenizers.items()}
    assert got == {
        "llama": (32000, 1, 2, "<s>", "</s>"),
        "hf_llama": (32000, 1, 2, "<s>", "</s>"),
        "stories": (512, 1, 2, "<s>", "</s>"),
        "smollm2": (49152, 1, 2, "<|im_start|>", "<|im_end|>"),
    }


@fuzzed
@given(parts=texts)
def test_text_comes_back_from_its_ids(named: Callable[[str], Tokenizer], parts: list[str]) -> None:
    text = "".join(parts).replace("▁", "")  # SentencePiece's own sign for a space
    for name in ("llama", "hf_llama"):
        ((ids, offsets),) = named(name).encode([text])
        assert named(name).decode(ids.tolist()) == text
        assert (ids.dtype, offsets.dtype, offsets.shape) == (np.int32, np.int32, (len(ids), 2))


def test_real_text_comes_back_from_its_ids(tokenizers: dict[str, Tokenizer], dialogues: list[Conversation]) -> None:
    some = [message.content for conversation in dialogues[:200] for message in conversation.messages]
    for tokenizer in tokenizers.values():
        assert [tokenizer.decode(ids) for ids in ids_of(tokenizer, *some)] == some


def test_special_tokens_can_be_left_out_of_decoded_text(llama: Tokenizer) -> None:
    (ids,) = ids_of(llama, "<s>Hi</s>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert llama.decode(ids, skip_special_tokens=True) == "Hi"


@pytest.fixture(scope="module")
def words(dialogues: list[Conversation]) -> list[str]:
    years = [f"{year}, {year}" for year in range(1900, 2000)]  # pieces of several digits, if they were allowed
    return [message.content for conversation in dialogues[:60] for message in conversation.messages] + years


def test_training_a_tokenizer_is_deterministic_and_its_ids_are_sentencepieces(words: list[str]) -> None:
    first, second = train_sentencepiece(words, 400), train_sentencepiece(iter(words), 400)
    assert first.files == second.files
    assert first.digest == second.digest != train_sentencepiece(words, 401).digest
    assert (first.vocab_size, first.bos_id, first.eos_id) == (400, 1, 2)
    processor = SentencePieceProcessor(model_proto=first.files["tokenizer.model"])
    some = [*words, "  two  spaces ", "12345", "é漢😀\x01", "\tTab\r\n"]
    assert ids_of(first, *some) == processor.encode(some)
    assert [first.decode(ids) for ids in ids_of(first, *some)] == some  # bytes as fallback: nothing is unknown
    assert not [i for i in range(400) if re.search(r"\d\d", processor.id_to_piece(i)) and not processor.is_byte(i)]


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    for name, tokenizer in tokenizers.items():
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert again.files == tokenizer.files
        assert (again.digest, again.special) == (tokenizer.digest, tokenizer.special)
    assert (tmp_path / "llama" / "tokenizer.model").is_file()
    assert load_tokenizer(tmp_path / "llama" / "tokenizer.model").digest == tokenizers["llama"].digest


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tokenizer_config.json", '{"bos_token": "<s>"}', "tokenizer_config.json: no eos_token that tokenizer.json kn"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "tokenizer_config.json: no eos_token that tokenizer.json"),
        ("tokenizer_config.json", None, "tokenizer_config.json: no eos_token"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not JSON"),
        ("tokenizer.json", '{"version": "1.0", ', "tokenizer.json: not readable as a tokenizer"),
        ("tokenizer.json", "{}", "tokenizer.json: not readable as a tokenizer"),
        ("tokenizer.json", "[]", "tokenizer.json: not readable as a tokenizer"),
    ],
)
def test_a_damaged_folder_is_named(
    shared_data: Path, tmp_path: Path, file: str, content: str | None, sentence: str
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared_data / "models" / "stories260K-hf" / name, tmp_path / name)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/{sentence}"):
        load_tokenizer(tmp_path)


def test_an_eos_token_written_as_an_object_is_read(shared_data: Path, tmp_path: Path) -> None:
    shutil.copyfile(shared_data / "models" / "stories260K-hf" / "tokenizer.json", tmp_path / "tokenizer.json")
    config = {"bos_token": {"content": "<s>", "normalized": True}, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).special.eos == "</s>"


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\x10cut"])
def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(UserError, match=f"^{tmp_path}/tokenizer.model: "):
            load_tokenizer(path)
    with pytest.raises(UserError):
        tokenizer_from_sentencepiece(content)


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}: no tokenizer.json or tokenizer.model there"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("count", "size"), [(10, 100), (1, 5000), (0, 300)])
def test_a_vocabulary_that_the_text_cannot_fill_is_an_error(words: list[str], count: int, size: int) -> None:
    with pytest.raises(UserError, match=f"cannot train a tokenizer of {size} pieces on this text: "):
        train_sentencepiece(words[:count], size)
