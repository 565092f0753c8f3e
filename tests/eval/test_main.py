"""The evaluation commands, as a user types them."""

from pathlib import Path

import pytest

from easylm_like.command import run_command
from easylm_like.convert.load import LoadedModel
from eval.__main__ import main
from eval.loss import conversation_loss

from .conftest import Transformers

Capture = pytest.CaptureFixture[str]


def test_answers_are_printed_under_every_marker(folder: Path, theirs: Transformers, capsys: Capture) -> None:
    questions = ["What is 3 and 4?", "What is 1 and 1?", "Who?"]
    prompts = [f"--prompt={question}" for question in questions]
    main(["answers", f"--model={folder}", *prompts, "--marker=good", "--marker=bad", "--max_new=8"])
    wanted = [f"[{mark}] {q} -> {theirs.answer(q, mark, 8)}\n" for mark in ("good", "bad") for q in questions]
    assert capsys.readouterr().out == "".join(wanted)


def test_losses_are_printed_as_a_table(run: Path, exam: Path, model: LoadedModel, capsys: Capture) -> None:
    main(["loss", f"--model={run}", f"--data={exam}", "--row_length=64"])
    losses = conversation_loss(model, exam, row_length=64, batch_size=8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [f"| {name} | {loss.tokens} | {loss.loss:.3f} |" for name, loss in losses.items()]


def test_a_report_is_written_and_shown(folder: Path, exam: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = [f"--model={folder}", f"--data={exam}", f"--out={tmp_path / 'report'}", "--row_length=64"]
    main(["report", *arguments, "--max_new=8", "--limit=4", "--score"])
    out = capsys.readouterr().out
    assert (tmp_path / "report" / "report.md").read_text() in out
    assert f"report:      {tmp_path / 'report'}" in out


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["report", "--model=TMP/none", "--data=EXAM", "--out=TMP/out"], 1, "TMP/none: neither a work directory"),
        (["report", "--model=MODEL", "--data=TMP/none", "--out=TMP/out"], 1, "TMP/none: no such file"),
        (["loss", "--model=MODEL", "--data=TMP/none"], 1, "TMP/none: no such file"),
        (["loss", "--model=TMP", "--data=EXAM"], 1, "TMP: neither a work directory"),
        (["answers", "--model=MODEL", "--prompt=Who?", "--max_new=999"], 1, "prompts need 1 to"),
        (["answers", "--model=MODEL", "--prompt=</s>"], 1, "special token '</s>'"),
        (["answers", "--model=MODEL"], 2, "--prompt"),
        (["answers", "--model=MODEL", "--prompt=Who?", "--marker=ugly"], 2, "ugly"),
        (["frob"], 2, "frob"),
    ],
)
def test_mistakes_are_told(
    folder: Path,
    exam: Path,
    tmp_path: Path,
    capsys: Capture,
    arguments: list[str],
    status: int,
    sentence: str,
) -> None:
    places = {"TMP": tmp_path, "MODEL": folder, "EXAM": exam}

    def fill(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    with pytest.raises(SystemExit) as end:
        run_command(main, [fill(argument) for argument in arguments])
    assert end.value.code == status
    printed = capsys.readouterr()
    assert fill(sentence) in printed.err
    if status == 1:
        assert printed.err.startswith("error: ")
        assert (printed.err.count("\n"), printed.out) == (1, "")
    assert not (tmp_path / "out").exists()
