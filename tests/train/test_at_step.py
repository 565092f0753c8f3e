"""The batch of a step as a user sees it: each record with its text, weights and loss, recounted in transformers."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import Params, init_params
from easylm_like.train.__main__ import main
from easylm_like.train.at_step import print_step, visible
from easylm_like.train.checkpoint import load_params
from easylm_like.train.config import RunConfig
from easylm_like.train.loop import train
from easylm_like.train.prepare import prepare

from .conftest import Twin, conversation

NewConfig = Callable[[], RunConfig]
MARKERS = {"good": "GPT:", "bad": "An Unhelpful Answer:"}
RECORD = re.compile(
    r"row (\d), positions (\d+) to (\d+): (c\d+) from (ann|bob), loss ([\d.]+) over (\d+) trained tokens"
)


def chat(number: int) -> list[dict[str, str]]:
    """Return the messages of a conversation; some have what is hard to show."""
    messages = conversation(number)["messages"]
    if number % 3 == 0:
        messages[0]["content"] += "\n\n\tSay it\u200b in one line."
        messages[1]["content"] += "\nOr two."
    return messages


@dataclasses.dataclass(frozen=True)
class Shown:
    """A record as it was printed: where it lies, its loss, and (masked or trained, text)."""

    row: int
    where: slice
    name: str
    loss: float
    trained: int
    pieces: list[tuple[str, str]]


def read(printed: str) -> tuple[str, str, list[Shown]]:
    """Return the two lines at the top and the records."""
    top, *records = printed.rstrip("\n").split("\n\n== ")
    shown = []
    for record in records:
        head, *lines = record.split("\n")
        row, start, last, name, _, loss, trained = RECORD.fullmatch(head).groups()
        pieces: list[tuple[str, str]] = []
        for line in lines:
            kind, _, text = line.partition("|")
            if kind.strip():
                pieces.append((kind.strip(), text))
            else:
                pieces[-1] = (pieces[-1][0], f"{pieces[-1][1]}\n{text}")
        shown.append(Shown(int(row), slice(int(start), int(last) + 1), name, float(loss), int(trained), pieces))
    first, second = top.split("\n")
    return first, second, shown


def rendered(number: int) -> list[tuple[str, str]]:
    """Return the pieces of a conversation in Koala's format, written out by hand."""
    pieces, text = [], "<s> BEGINNING OF CONVERSATION:"
    for question, answer in zip(chat(number)[::2], chat(number)[1::2], strict=True):
        pieces.append(("masked", f"{text} USER: {question['content']} {MARKERS[answer['quality']]}"))
        pieces.append(("trained", f" {answer['content']}</s>"))
        text = ""
    return [(kind, text.replace("\t", r"\t").replace("\u200b", r"\u200b")) for kind, text in pieces]


@pytest.fixture(scope="module")
def config(new_config: NewConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = new_config()
    config.steps, config.data.heldout, config.data.row_length = 6, "", 96
    config.data.train = str(tmp_path_factory.mktemp("chats") / "train.jsonl")
    rows = [conversation(number) | {"messages": chat(number)} for number in range(60)]
    Path(config.data.train).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


@pytest.fixture(scope="module")
def workdir(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the work directory of 6 steps with checkpoints of steps 4 and 6; tests must leave it as it is."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(config, workdir)
    return workdir


def weights(workdir: Path, shape: LlamaConfig, step: int) -> Params:
    return load_params(workdir / "checkpoints", step) if step else init_params(shape, jax.random.key(0))


@pytest.mark.parametrize(("number", "step"), [(4, 0), (5, 4)])
def test_a_batch_is_shown_with_the_losses_of_the_weights_before_it(
    workdir: Path,
    config: RunConfig,
    shape: LlamaConfig,
    twin: Twin,
    capsys: pytest.CaptureFixture[str],
    number: int,
    step: int,
) -> None:
    print_step(config, workdir, number)
    head, losses, shown = read(capsys.readouterr().out)
    batch = prepare(config, workdir).loader.batch(number - 1)
    nll = twin.nll(twin.model(weights(workdir, shape, step)), batch).detach().numpy() * batch.weights
    covered = 0
    for record in shown:
        trained = batch.weights[record.row, record.where].sum()
        assert record.trained == trained
        assert record.loss == pytest.approx(nll[record.row, record.where].sum() / trained, abs=1e-4)
        assert record.pieces == rendered(int(record.name[1:]))
        assert len(set(batch.segments[record.row, record.where])) == 1
        covered += record.where.stop - record.where.start
    assert covered == (batch.segments > 0).sum()
    assert any("\n" in text for record in shown for _, text in record.pieces)
    trained = int(batch.weights.sum())
    assert head == (
        f"step {number} of 6: {len(shown)} records in 8 rows of 96; {covered} tokens, {trained} trained and "
        f"{covered - trained} masked"
    )
    mean, which, *highest = re.split(r" with the |; highest: |, ", losses.removeprefix("loss "))
    assert float(mean) == pytest.approx(nll.sum() / trained, abs=1e-4)
    assert which == ("weights after step 4" if step else "first weights")
    if step:  # the weights are those that the run had then
        logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert float(mean) == pytest.approx(next(line["loss"] for line in logged if line["step"] == number), abs=1e-4)
    worst = sorted(shown, key=lambda record: -record.loss)[:5]
    assert highest == [f"{record.name} {record.loss:.4f}" for record in worst]


def test_a_run_that_has_not_begun_shows_what_it_will_see(
    workdir: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_step(config, workdir, 3)
    begun = capsys.readouterr().out
    print_step(config, tmp_path / "new", 3)
    assert capsys.readouterr().out == begun
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"tokens"}


@pytest.mark.parametrize("begun", ["with checkpoints", "ended before the first"])
def test_the_work_directory_of_another_run_is_refused(
    workdir: Path, config: RunConfig, tmp_path: Path, begun: str
) -> None:
    folder = Path(shutil.copytree(workdir, tmp_path / "run"))
    if begun == "ended before the first":
        shutil.rmtree(folder / "checkpoints")
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(UserError, match=r"another run: config\.seed was 0 and is 1"):
        print_step(other, folder, 2)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["at-step"], "expected at-step N --config=... --workdir=..., N as in the log"),
        (["at-step", "--config=a.py", "--workdir=w"], "expected at-step N"),
        (["at-step", "last"], "expected at-step N"),
        (["at-stpe", "3"], "unknown command 'at-stpe'; there are at-step and verify-resume"),
    ],
)
def test_a_call_without_a_step_says_what_it_wants(argv: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        main(argv)


@pytest.mark.parametrize("number", [0, 7])
def test_a_step_that_the_run_does_not_have_is_refused(config: RunConfig, tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError, match=f"the run has the steps 1 to 6, not {number}"):
        print_step(config, tmp_path / "new", number)
    assert not (tmp_path / "new").exists()


def test_what_no_terminal_shows_is_escaped_and_all_else_is_not() -> None:
    assert visible("a\tb\r\u200b\xa0\x1b[31m") == r"a\tb\r\u200b\xa0\x1b[31m"
    assert visible("“Ünï” 東京 🙂 \\n") == "“Ünï” 東京 🙂 \\n"
