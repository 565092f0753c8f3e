"""The answers that a run logs: to each prompt under each marker at every look, eval's own, and none twice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from easylm_like.convert.load import load_model
from easylm_like.data.conversation import Message, Quality, Role
from easylm_like.model.generate import Sampling
from easylm_like.train.config import RunConfig, SampleConfig
from easylm_like.train.loop import train
from eval.answers import answer

NewConfig = Callable[[], RunConfig]
PROMPTS = ("What is 3 and 4?", "What is 5 and 9? And, while we are at it,\nwhat is 1 and 1?")


@pytest.fixture(scope="module")
def config(new_config: NewConfig) -> RunConfig:
    """Return a run that looks before the first step and after the 4th and the 8th."""
    config = new_config()
    config.samples = SampleConfig(prompts=PROMPTS, max_new=8)
    return config


@pytest.fixture(scope="module")
def workdir(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run's work directory; tests must leave it as it is."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def interrupted(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return it as a kill after the last look, before the last checkpoint was whole, would have left it."""
    copy = Path(shutil.copytree(workdir, tmp_path_factory.mktemp("runs") / "interrupted"))
    shutil.rmtree(copy / "checkpoints" / "8")
    return copy


def samples(workdir: Path) -> list[dict[str, str | int]]:
    return [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]


def test_every_prompt_is_answered_under_every_marker_at_every_look(workdir: Path) -> None:
    asked = [(line["step"], line["marker"], line["prompt"]) for line in samples(workdir)]
    assert asked == [(step, marker, prompt) for step in (0, 4, 8) for marker in ("good", "bad") for prompt in PROMPTS]
    log = (workdir / "train.log").read_text()
    for line in samples(workdir):
        told = f"step {line['step']:6}  {line['marker']} answer to {line['prompt'][:40]!r}: {line['answer'][:80]!r}"
        assert log.count(told + "\n") == 1


def test_the_answers_are_those_of_eval_with_the_same_weights(workdir: Path, interrupted: Path) -> None:
    chats = [[Message(Role.USER, prompt)] for prompt in PROMPTS]
    for step, folder in ((8, workdir), (4, interrupted)):
        model = load_model(folder)
        for quality in Quality:
            logged = [s["answer"] for s in samples(workdir) if (s["step"], s["marker"]) == (step, quality.value)]
            assert logged == answer(model, chats, quality, max_new=8, sampling=Sampling())
    assert len({line["answer"] for line in samples(workdir)}) > 4, "weights, markers and prompts make a difference"


def test_a_resumed_run_writes_no_answer_twice(config: RunConfig, workdir: Path, interrupted: Path) -> None:
    train(config, interrupted)
    assert "start at step 4 of 8" in (interrupted / "train.log").read_text()
    assert samples(interrupted) == samples(workdir)
