"""What a run wrote down survives a kill in the middle of a line, and steps that are run again are counted once."""

import json
from pathlib import Path

import pytest

from easylm_like.train.runlog import RunLog, clock


def test_steps_that_will_be_run_again_are_forgotten_and_so_is_half_a_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, active=True, resume_at=0)
    for step in (2, 4, 6):
        log.metrics(step, "train", {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 8, "ki')
    RunLog(tmp_path, active=True, resume_at=4).metrics(6, "train", {"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 1.0), (4, 1.0), (6, 0.5)]


def test_only_one_host_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, active=False, resume_at=0)
    log.line("hello")
    log.metrics(1, "train", {})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
