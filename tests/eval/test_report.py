"""A report holds what it promises, its numbers can be recounted from what lies beside them, and it is made once."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from easylm_like.convert.load import LoadedModel
from easylm_like.digests import write_digests
from easylm_like.errors import UserError
from eval.loss import conversation_loss
from eval.report import ReportConfig, write_report

from .conftest import conversation

FILES = {"report.json", "report.md", "answers_good.jsonl", "answers_bad.jsonl"}


@pytest.fixture(scope="module")
def config(run: Path, folder: Path, exam: Path) -> ReportConfig:
    out = run.parent / "report"
    return ReportConfig(
        model=folder, data=exam, out=out, run=run, baseline=run, score=True, max_new=8, row_length=64, batch_size=8
    )


@pytest.fixture(scope="module")
def report(config: ReportConfig) -> dict[str, object]:
    return write_report(config)


def read_answers(out: Path, marker: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / f"answers_{marker}.jsonl").read_text().splitlines()]


def test_the_report_has_the_promised_numbers(
    config: ReportConfig, report: dict[str, object], model: LoadedModel
) -> None:
    assert json.loads((config.out / "report.json").read_text()) == report
    assert report["accuracy"]["good"] == 0.5, "the exam repeats every second answer of the model under the good marker"
    losses = conversation_loss(model, config.data, row_length=64, batch_size=8)
    assert report["heldout_loss"] == {name: pytest.approx(loss.loss) for name, loss in losses.items()}
    assert report["heldout_tokens"] == {name: loss.tokens for name, loss in losses.items()}
    assert set(report["heldout_loss"]) == {"all", "ann/good", "ann/bad", "bob/good"}
    assert report["heldout_loss_before"] == report["heldout_loss"], "the baseline is the run that the model is made of"
    assert (report["model"], report["data"]) == (str(config.model), str(config.data))
    assert report["template"] == "koala"


def test_the_numbers_are_those_of_the_answers(config: ReportConfig, report: dict[str, object]) -> None:
    assert {path.name for path in config.out.iterdir()} == {*FILES, "curves.png"}
    for marker in ("good", "bad"):
        answers = read_answers(config.out, marker)
        assert len(answers) == 8, "the answer that was judged bad is no reference"
        assert {a["marker"] for a in answers} == {marker}
        right = sum(a["text"].strip() == a["reference"].strip() for a in answers)
        assert report["accuracy"][marker] == right / 8
        detail = report["accuracy_detail"][marker]
        assert (detail["right"], detail["asked"]) == (right, 8)
        assert detail["low"] <= right / 8 <= detail["high"]


def test_people_can_read_it(config: ReportConfig, report: dict[str, object]) -> None:
    text = (config.out / "report.md").read_text()
    loss, tokens = report["heldout_loss"]["all"], report["heldout_tokens"]["all"]
    assert f"| all | {tokens} | {loss:.3f} | {loss:.3f} |" in text
    assert "| under the good marker | 8 | 50.0% | 21.5% to 78.5% |" in text
    answers = read_answers(config.out, "bad")
    assert f"**{answers[0]['question']}** {' '.join(answers[0]['text'].split())}" in text


def test_the_same_report_is_not_made_again_and_another_one_is(
    config: ReportConfig, report: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in config.out.iterdir()}
    assert write_report(config) == report
    assert "already reports this model on this data" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in config.out.iterdir()} == before
    data, out = tmp_path / "exam.jsonl", tmp_path / "report"
    data.write_text("".join(config.data.read_text().splitlines(keepends=True)[:4]))
    fields = {"model": config.model, "data": data, "out": out, "max_new": 8, "row_length": 64, "batch_size": 8}
    first = write_report(ReportConfig(**fields))
    assert {path.name for path in out.iterdir()} == FILES
    assert (first["accuracy"], first["heldout_loss_before"]) == ({}, {})
    data.write_text(data.read_text() + json.dumps(conversation(50)) + "\n")
    assert write_report(ReportConfig(**fields))["digest"] != first["digest"]
    assert len(read_answers(out, "good")) == 5
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["exam.jsonl", "report"]


def test_a_limit_takes_its_share_of_every_source(
    config: ReportConfig, rows: Callable[..., Path], tmp_path: Path
) -> None:
    many = [conversation(2 * number) for number in range(12)] + [conversation(2 * number + 1) for number in range(3)]
    fields = {"model": config.model, "data": rows(*many), "out": tmp_path / "report", "max_new": 8, "row_length": 64}
    write_report(ReportConfig(**fields, limit=4))
    assert [a["source"] for a in read_answers(tmp_path / "report", "good")] == ["ann", "ann", "bob", "bob"]


def test_a_conversation_that_cannot_be_asked_is_in_the_report(
    config: ReportConfig, rows: Callable[..., Path], tmp_path: Path
) -> None:
    long = conversation(1)
    long["messages"][0]["content"] = "word " * 200
    data = rows(conversation(2), conversation(4), conversation(6), long)
    fields = {"model": config.model, "data": data, "out": tmp_path / "report", "max_new": 8, "row_length": 64}
    report = write_report(ReportConfig(**fields, score=True))
    *asked, problem = read_answers(tmp_path / "report", "good")
    assert [a["problem"] for a in asked] == [None] * 3
    assert problem["text"] is None
    assert "there is room for 120" in problem["problem"]
    assert report["accuracy_detail"]["good"]["asked"] == 4
    assert "there is room for 120" in (tmp_path / "report" / "report.md").read_text()


def test_numbers_that_do_not_exist_are_no_json_of_their_own(
    config: ReportConfig, rows: Callable[..., Path], tmp_path: Path
) -> None:
    """A file whose only answers are judged bad has no share of right ones; strict readers of JSON do not know NaN."""
    data = rows(conversation(1, "bad"), conversation(2, "bad"))
    fields = {"model": config.model, "data": data, "out": tmp_path / "report", "max_new": 8, "row_length": 64}
    report = write_report(ReportConfig(**fields, score=True))
    text = (tmp_path / "report" / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in report.json"))
    assert report["accuracy"]["good"] is None or math.isfinite(report["accuracy"]["good"])


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test that begins with the expensive part."""
    monkeypatch.setattr("eval.report.conversation_loss", lambda *_, **__: pytest.fail("the losses are computed"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("missing", ["model", "data", "baseline", "run"])
def test_what_is_missing_is_told_before_the_work(config: ReportConfig, tmp_path: Path, missing: str) -> None:
    fields = {"model": config.model, "data": config.data, "out": tmp_path / "report", missing: tmp_path / "none"}
    with pytest.raises((UserError, OSError), match="none"):
        write_report(ReportConfig(**fields, max_new=8, row_length=64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_work")
def test_a_folder_of_somebody_else_is_not_replaced(config: ReportConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    fields = {"model": config.model, "data": config.data, "out": tmp_path}
    with pytest.raises(UserError, match="exists and is not replaced"):
        write_report(ReportConfig(**fields, max_new=8, row_length=64))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_retrained_model_is_reported_anew(config: ReportConfig, report: dict[str, object], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(config.model, tmp_path / "hf"))
    fields = {"model": folder, "data": config.data, "out": tmp_path / "report", "max_new": 8, "row_length": 64}
    first = write_report(ReportConfig(**fields))
    with (folder / "generation_config.json").open("a") as file:  # as of a model that is another
        file.write(" ")
    write_digests(folder)
    assert write_report(ReportConfig(**fields))["digest"] != first["digest"]
