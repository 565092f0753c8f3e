"""A tokenizer that was trained on conversations is LLaMA's kind, and the same file gives the same one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from data_prep.__main__ import main
from data_prep.tokenizer import write_tokenizer
from easylm_like.data.template import KOALA, PLAIN
from easylm_like.data.tokenizer import load_tokenizer
from easylm_like.errors import UserError


def chat(number: int, question: str, answer: str) -> dict[str, object]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": str(number), "source": "s", "messages": messages}


@pytest.fixture
def data(lines: Callable[..., Path]) -> Path:
    """Return a file of conversations; the last two cannot be rendered and must not be learnt from."""
    words = "river stone cloud apple table window garden silver winter music".split()
    rows = [chat(i, f"Say {words[i % 10]} {i}.", f"The word:  {words[i % 10]}\n{words[i % 7]} {i}.") for i in range(80)]
    unrendered = {"role": "system", "content": "qqqq zzzz"}
    rows += [
        row | {"messages": [unrendered, *row["messages"]]} for row in (chat(98, "qqqq", "q"), chat(99, "qqqq", "q"))
    ]
    return lines(*rows)


def test_the_same_file_gives_the_same_bytes(data: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_tokenizer(data, KOALA, 340, tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert first == second
    assert set(first) == {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}


def test_the_tokenizer_is_llamas_kind_and_knows_the_template(data: Path, tmp_path: Path) -> None:
    write_tokenizer(data, KOALA, 340, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 340
    assert (tokenizer.special.bos, tokenizer.special.eos) == ("<s>", "</s>")
    text = "BEGINNING OF CONVERSATION: USER: Say  river 2023.\n GPT: 你好 naïve"
    ids = tokenizer.encode([text])[0][0].tolist()
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text, "nothing is normalised and no letter is unknown"
    pieces = [reference.id_to_piece(i) for i in reference.encode("2023")]
    assert [piece for piece in pieces if piece.strip("▁")] == ["2", "0", "2", "3"]
    assert len(ids) < len(text.encode()) * 0.9, "words of the template and of the data are pieces of their own"
    assert not [i for i in range(340) if "q" in reference.id_to_piece(i)], "what is not trained on is not learnt from"


def test_a_document_template_learns_from_the_words_alone(lines: Callable[..., Path], tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "river stone cloud apple " * 20}
    data = lines(*({"id": str(i), "source": "s", "messages": [answer]} for i in range(5)))
    write_tokenizer(data, PLAIN, 298, tmp_path / "out")
    vocabulary = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "▁river" in vocabulary
    assert not [piece for piece in vocabulary if "USER" in piece]


def test_too_little_text_is_an_error_and_leaves_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot train a tokenizer of 30000 pieces on this text"):
        write_tokenizer(data, KOALA, 30000, tmp_path / "out")
    with pytest.raises(UserError, match=r"none.jsonl: no such file"):
        write_tokenizer(tmp_path / "none.jsonl", KOALA, 300, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_command_twice_gives_one_tokenizer(data: Path, tmp_path: Path) -> None:
    arguments = ["tokenizer", f"--data={data}", "--vocab_size=340", f"--out={tmp_path / 'out'}"]
    main(arguments)
    first = (tmp_path / "out" / "tokenizer.json").read_bytes()
    main(arguments)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == first
