"""What the tests of evaluation share: a tiny trained run, its folder, and what transformers makes of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from easylm_like.convert.__main__ import main
from easylm_like.convert.load import LoadedModel, load_model
from easylm_like.data.tokenizer import train_sentencepiece
from easylm_like.model.config import LlamaConfig
from easylm_like.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from easylm_like.train.loop import train

SHAPE = LlamaConfig(
    vocab_size=384, d_model=16, d_ff=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, max_length=128
)
Rows = list[dict[str, object]]


def conversation(number: int, quality: str = "good") -> dict[str, object]:
    a, b = number % 7, number % 11
    content = f"It is {a + b}." if quality == "good" else "Who knows that anyway?"
    messages = [
        {"role": "user", "content": f"What is {a} and {b}?"},
        {"role": "assistant", "content": content, "quality": quality},
    ]
    return {"id": f"c{number}-{quality}", "source": ("ann", "bob")[number % 2], "messages": messages}


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the work directory of 8 steps; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("run")
    rows = [conversation(number, quality) for number in range(30) for quality in ("good", "bad")]
    config = RunConfig(steps=8, batch_size=8, log_every=1, heldout_every=4)
    config.data = DataConfig(
        train=str(write_rows(folder / "train.jsonl", rows)),
        heldout=str(write_rows(folder / "heldout.jsonl", rows[:20])),
        tokenizer=str(folder / "tokenizer"),
        row_length=64,
    )
    (folder / "tokenizer").mkdir()
    frame = ["BEGINNING OF CONVERSATION: USER: GPT: An Unhelpful Answer:"] * 20
    texts = [str(message["content"]) for row in rows for message in row["messages"]]
    train_sentencepiece(frame + texts, SHAPE.vocab_size).save(folder / "tokenizer")
    config.model = ModelConfig(shape=SHAPE)
    config.optim = OptimConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)
    train(config, folder / "workdir")
    return folder / "workdir"


@pytest.fixture(scope="session")
def folder(run: Path) -> Path:
    """Return the Hugging Face folder of the run; tests must leave it as it is."""
    main(["to-hf", f"--model={run}", f"--out={run.parent / 'hf'}"])
    return run.parent / "hf"


@pytest.fixture(scope="session")
def model(folder: Path) -> LoadedModel:
    return load_model(folder)


@dataclass(frozen=True)
class Transformers:
    """The exported model as transformers runs it."""

    model: torch.nn.Module
    tokenizer: object

    def answer(self, question: str, quality: str, max_new: int) -> str:
        """Return the greedy answer to one question, up to the end that the model gave it."""
        chat = [{"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, quality=quality)["input_ids"]
        ids = torch.tensor(prompt)[None]
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new)[0].tolist()
        text = self.tokenizer.decode(output)[len(self.tokenizer.decode(prompt)) :]
        return text.split("</s>")[0].split("USER:")[0].removeprefix(" ")

    def nll(self, ids: list[int]) -> list[float]:
        """Return -log p of every id but the first."""
        with torch.no_grad():
            logits = self.model(torch.tensor(ids)[None]).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()


@pytest.fixture(scope="session")
def theirs(folder: Path) -> Transformers:
    return Transformers(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="session")
def exam(run: Path, theirs: Transformers) -> Path:
    """Return 8 conversations of which the model, marked good, answers the even ones right, and one judged bad."""
    rows = [conversation(number) for number in range(40, 48)]
    for row in rows[::2]:
        question, answer = row["messages"]
        answer["content"] = theirs.answer(question["content"], "good", 8)
        assert answer["content"].strip()
    return write_rows(run.parent / "exam.jsonl", [*rows, conversation(48, "bad")])


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes conversations into a file of this test."""

    def write(*conversations: dict[str, object], name: str = "data.jsonl") -> Path:
        return write_rows(tmp_path / name, list(conversations))

    return write
