"""How a run ends before its last step, and what the next start makes of it."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from easylm_like.data.loader import Batch, Loader
from easylm_like.errors import UserError
from easylm_like.train import __main__ as command
from easylm_like.train.checkpoint import read_run_info, saved_steps, step_damage
from easylm_like.train.config import Damaged, RunConfig, SampleConfig
from easylm_like.train.loop import train
from easylm_like.train.runlog import RunLog
from easylm_like.train.saver import Saver
from easylm_like.train.stop import EXIT_SAVED

pytestmark = pytest.mark.usefixtures("compile_fast")

NewConfig = Callable[[], RunConfig]
Losses = dict[int, float]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, new_config: NewConfig) -> Losses:
    """Return the losses of the run without a break."""
    workdir = tmp_path_factory.mktemp("whole")
    config = new_config()
    config.data.heldout = ""
    assert train(config, workdir)
    return losses(workdir)


def losses(workdir: Path) -> Losses:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def terminate_at(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process SIGTERM when the numbers of a step are written down."""
    metrics = RunLog.metrics

    def write_and_terminate(log: RunLog, step: int, kind: str, values: Mapping[str, float]) -> None:
        metrics(log, step, kind, values)
        if step == wanted:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "metrics", write_and_terminate)


def test_sigterm_saves_and_the_run_goes_on_from_there(
    whole: Losses, new_config: NewConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = new_config()
    config.data.heldout, config.checkpoint_every = "", 0
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        terminate_at(5, patch)
        assert not train(config, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert saved_steps(tmp_path / "checkpoints") == [6], "the step that was running when the signal came is not lost"
    assert "stopped by SIGTERM; step 6 of 8 is saved" in (tmp_path / "train.log").read_text()
    assert train(config, tmp_path)
    assert "start at step 6 of 8" in (tmp_path / "train.log").read_text()
    assert losses(tmp_path) == whole


def test_a_supervisor_can_tell_a_saved_run_from_a_failed_one(
    new_config: NewConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easylm_like.train.loop.train", lambda config, workdir: False)
    monkeypatch.setattr("easylm_like.train.__main__.read_flags", lambda *_: (new_config(), dict.fromkeys(FLAGS, "")))
    with pytest.raises(SystemExit) as end:
        command.main(["--config=any"])
    assert end.value.code == EXIT_SAVED == 75


FLAGS = ("workdir", "multihost", "coordinator", "hosts", "host")


def test_the_best_checkpoint_stays_with_the_last_and_the_milestones(
    new_config: NewConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = iter([9.0, 5.0, 2.0, 4.0, 3.0, 8.0, 7.0, 6.0, 5.5])  # of steps 0 to 8
    look = {"all": 0.0}

    def measured(*_: object) -> dict[str, object]:
        look["all"] = next(scripted)
        return {"all": Measured(look["all"])}

    monkeypatch.setattr("easylm_like.train.loop.heldout_losses", measured)
    config = new_config()
    config.checkpoint_every, config.heldout_every, config.keep_checkpoints = 1, 0, 1
    config.keep_best, config.milestone_every = 2, 5
    train(config, tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [2, 4, 5, 8]
    assert read_run_info(tmp_path / "checkpoints", 2)[1]["heldout_loss"] == 2.0


class Measured:
    def __init__(self, loss: float) -> None:
        self.loss = loss


def test_a_damaged_checkpoint_stops_the_run_or_is_passed_over_when_asked(
    whole: Losses, new_config: NewConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = new_config()
    config.data.heldout, config.checkpoint_every = "", 3
    with monkeypatch.context() as patch:
        terminate_at(6, patch)
        assert not train(config, tmp_path)
    damaged = next((tmp_path / "checkpoints" / "7" / "optimizer" / "d").iterdir())
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=rf"{damaged} is damaged.*go back to step 6 with --config.damaged=previous"):
        train(config, tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [6, 7]
    other = replace(config, damaged=Damaged.PREVIOUS, seed=1)
    with pytest.raises(UserError, match=r"config\.seed was 0 and is 1"):
        train(other, tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [6, 7], "another run's checkpoint is not touched"
    assert train(replace(config, damaged=Damaged.PREVIOUS), tmp_path)
    log = (tmp_path / "train.log").read_text()
    assert "step 7 is set aside" in log
    assert "start at step 6 of 8" in log
    assert losses(tmp_path) == whole
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"6", "7.damaged", "8"}


def test_a_save_that_fails_ends_the_run_at_once(
    new_config: NewConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("easylm_like.train.saver.finish_save", fail)
    check = Saver.check

    def wait_and_check(saver: Saver) -> None:  # as if a step took longer than a save
        if saver._pending:
            saver._pending[1].exception()
        check(saver)

    monkeypatch.setattr(Saver, "check", wait_and_check)
    config = new_config()
    config.data.heldout, config.checkpoint_every = "", 2
    with pytest.raises(UserError, match=r"checkpoint of step 2 could not be written: the disk is full"):
        train(config, tmp_path)
    assert list(losses(tmp_path)) == [1, 2]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_batch_that_gives_no_number_leaves_the_last_good_checkpoint(
    new_config: NewConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = new_config()
    config.data.heldout, config.checkpoint_every, config.keep_checkpoints, config.log_every = "", 2, 1, 4
    config.optim.skip_spikes, batch = 6.0, Loader.batch

    def broken(loader: Loader, step: int) -> Batch:
        made = batch(loader, step)
        if step == 5:
            made.weights[3] *= np.nan
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batch", broken)
        with pytest.raises(UserError, match="step 6: loss nan"):
            train(config, tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [4]
    assert step_damage(tmp_path / "checkpoints", 4) == []
    assert train(config, tmp_path), "the batch is as it should be now"


def test_a_second_run_in_the_same_work_directory_is_refused(
    new_config: NewConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, refused = new_config(), []
    config.data.heldout = ""

    def train_again(*_: object) -> None:
        with pytest.raises(UserError, match=rf"another run is training there \(process {os.getpid()} on") as told:
            train(config, tmp_path)
        refused.append(told.value)
        raise KeyboardInterrupt  # enough of the first one

    monkeypatch.setattr("easylm_like.train.loop._run_steps", train_again)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    assert len(refused) == 1


def test_samples_need_no_heldout_data(new_config: NewConfig, tmp_path: Path) -> None:
    config = new_config()
    config.steps, config.optim.warmup_steps, config.data.heldout = 1, 1, ""
    config.samples = SampleConfig(prompts=("What is 3 and 4?",), max_new=4)
    train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["marker"]) for line in lines] == [(0, "good"), (0, "bad"), (1, "good"), (1, "bad")]
