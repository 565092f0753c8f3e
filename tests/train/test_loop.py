"""Whole runs: killed and resumed, finished, refused, started from another one's weights, and gone wrong."""

import gzip
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from easylm_like.compiled import keep_compiled
from easylm_like.data.loader import Batch
from easylm_like.data.tokenizer import load_tokenizer
from easylm_like.errors import UserError
from easylm_like.model.config import Remat
from easylm_like.train.checkpoint import load_arrays, read_run_info, saved_steps
from easylm_like.train.config import LogConfig, RunConfig
from easylm_like.train.flops import Work, palm_flops, strict_flops
from easylm_like.train.loop import train
from easylm_like.train.prepare import prepare

pytestmark = pytest.mark.usefixtures("compile_fast")

NewConfig = Callable[[], RunConfig]
MEASURED = {"time", "tokens_per_second", "trained_tokens_per_second", "tflops_per_device", "mfu", "mfu_palm"} | {
    "host_memory_gib",
    "data_share",
}

# Runs `train` and kills its own process, as a machine does, in step 6, when the checkpoint of step 4 is on disk.
KILLED = """
import os, pickle, signal, sys, time
from pathlib import Path
import easylm_like.train.runlog as runlog
from easylm_like.train.loop import train

config, workdir = pickle.load(sys.stdin.buffer)
metrics = runlog.RunLog.metrics

def metrics_then_die(log, step, kind, values):
    metrics(log, step, kind, values)
    while step == 6:
        if (workdir / "checkpoints" / "4").is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)

runlog.RunLog.metrics = metrics_then_die
train(config, workdir)
"""


def metrics(workdir: Path, kind: str = "train") -> dict[int, dict[str, float]]:
    """Return the numbers that a run wrote down by step, times and sizes apart; every step only once."""
    kept = [line for line in written_lines(workdir) if line.pop("kind") == kind]
    numbers = {line.pop("step"): {k: v for k, v in line.items() if k not in MEASURED} for line in kept}
    assert len(numbers) == len(kept)
    return numbers


def written_lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Return every array of a checkpoint, weights and optimizer, by the name that Orbax gives it."""
    folder = workdir / "checkpoints" / str(step)
    arrays = {item: load_arrays(folder.absolute() / item) for item in ("params", "optimizer")}
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(arrays)}


def everything(workdir: Path) -> dict[str, bytes]:
    """Return the content of all files but the log, which may tell what was refused."""
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and path.name not in ("train.log", ".lock")
    }


@pytest.fixture(scope="module")
def new_config(new_config: NewConfig) -> NewConfig:
    """Return a function that makes the shared run, tracked in all ways that need no other program."""

    def make() -> RunConfig:
        config = new_config()
        config.log = LogConfig(tensorboard=True, peak_tflops=2.0)
        config.profile.steps = (3, 5)
        return config

    return make


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, new_config: NewConfig) -> Path:
    """Return the work directory of 8 steps without a break; tests must leave it as it is."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    train(new_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, new_config: NewConfig) -> Path:
    """Return the work directory of the same run, killed in step 6; tests must copy it."""
    workdir = tmp_path_factory.mktemp("runs") / "killed"
    run = pickle.dumps((new_config(), workdir))
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", KILLED], input=run, cwd=os.getcwd(), env=environment,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    return workdir


def test_a_run_learns_and_writes_down_what_it_did(unbroken: Path, new_config: NewConfig) -> None:
    losses = {step: numbers["loss"] for step, numbers in metrics(unbroken).items()}
    assert list(losses) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert losses[8] < losses[1] - 1
    heldout = metrics(unbroken, "heldout")
    assert list(heldout) == [0, 4, 8]
    assert heldout[8]["all"] < heldout[4]["all"] < heldout[0]["all"]
    assert set(heldout[0]) == {"all", "ann/good", "ann/bad", "bob/good", "bob/bad"}
    written = json.loads((unbroken / "config.json").read_text())
    assert written["config"]["optim"]["learning_rate"] == new_config().optim.learning_rate
    assert {"jax", "flax", "optax"} <= set(written["versions"])
    measured = {"heldout_loss": heldout[8]["all"]}
    assert read_run_info(unbroken / "checkpoints") == (8, written | measured)
    assert {path.name for path in (unbroken / "tokenizer").iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    summaries = [json.loads(path.read_text()) for path in (unbroken / "tokens").glob("*/summary.json")]
    for counts in summaries:
        assert counts["tokens"] == counts["trained"] + counts["masked"] + sum(counts["dropped_tokens"].values())
    assert {counts["conversations"] for counts in summaries} == {60, 16}
    assert "start at step 0 of 8" in (unbroken / "train.log").read_text()


def test_every_line_fits_the_terminal_and_every_number_is_right(unbroken: Path, new_config: NewConfig) -> None:
    shown = [line[20:] for line in (unbroken / "train.log").read_text().splitlines() if "  loss " in line]
    number = r"[\d,.]+"
    for line in shown:
        assert len(line) <= 150
        assert re.fullmatch(
            rf"step {{6}}\d/8  loss {number}  lr {number}e-0[234]  grad {number}  "
            rf"{number} tokens/s \({number} trained\)  MFU {number}% \(PaLM {number}%\)  "
            rf"host {number} GiB  data {number}%  \d+:\d\d left",
            line,
        )
    assert len(shown) == 8
    run = prepare(new_config(), unbroken)
    for line in (line for line in written_lines(unbroken) if line["kind"] == "train"):
        work = counted(run.loader.batch(line["step"] - 1))
        seconds = work.tokens / line["tokens_per_second"]
        assert line["trained_tokens"] == work.trained == pytest.approx(line["trained_tokens_per_second"] * seconds)
        speed = strict_flops(run.shape, work) / seconds / 1e12 / jax.device_count()
        assert line["tflops_per_device"] == pytest.approx(speed)
        assert line["mfu"] == pytest.approx(speed / 2.0)
        assert line["mfu_palm"] / line["mfu"] == pytest.approx(
            palm_flops(run.shape, work, 64) / strict_flops(run.shape, work)
        )
        assert line["learning_rate"] == pytest.approx(1e-2 / 2 if line["step"] == 1 else float(cosine(line["step"])))
        assert 0 <= line["data_share"] <= 1
        assert 0.1 < line["host_memory_gib"] < 100


def counted(batch: Batch) -> Work:
    """Return what there is to do for a batch, the visible pairs by their definition."""
    later = batch.positions[:, :, None] >= batch.positions[:, None, :]
    pairs = later & (batch.segments[:, :, None] == batch.segments[:, None, :]) & (batch.segments[:, :, None] > 0)
    return Work(batch.tokens.size, int((batch.segments > 0).sum()), int(batch.weights.sum()), int(pairs.sum()))


def cosine(step: int) -> float:
    """Return the rate of a step after the warm-up of 2, by the formula: from 1e-2 to 0 over the 6 that are left."""
    return 1e-2 * (1 + math.cos(math.pi * (step - 1 - 2) / 6)) / 2 if step > 2 else 1e-2


def scalars(workdir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows: (step, value) by name."""
    shown = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


def test_tensorboard_shows_what_was_written_down(unbroken: Path) -> None:
    got = scalars(unbroken)
    for kind, steps in (("train", range(1, 9)), ("heldout", (0, 4, 8))):
        wanted = metrics(unbroken, kind)
        for name in wanted[8]:
            assert got[f"{kind}/{name}"] == [(n, pytest.approx(wanted[n][name], rel=1e-6)) for n in steps]
    assert {name.removeprefix("train/") for name in got} >= MEASURED - {"time"}


def test_the_steps_asked_for_are_in_the_profile(unbroken: Path) -> None:
    (path,) = (unbroken / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "train"} == {"3", "4"}
    assert len(list(path.parent.glob("*.xplane.pb"))) == 1


def test_a_killed_run_resumes_bit_for_bit(unbroken: Path, killed: Path, new_config: NewConfig, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(killed, tmp_path / "run"))
    assert list(metrics(workdir)) == [1, 2, 3, 4, 5, 6], "steps 5 and 6 were run and are lost"
    assert saved_steps(workdir / "checkpoints") == [4]
    (workdir / "checkpoints" / "2.deleted" / "params").mkdir(parents=True)  # an old step, killed while it was deleted
    (workdir / "checkpoints" / "6.partial.orbax-checkpoint-tmp").mkdir()  # a new one, while it was saved
    train(new_config(), workdir)
    assert "start at step 4 of 8" in (workdir / "train.log").read_text()
    for kind in ("train", "heldout"):
        assert metrics(workdir, kind) == metrics(unbroken, kind)
    wanted, got = saved_arrays(unbroken, 8), saved_arrays(workdir, 8)
    assert got.keys() == wanted.keys()
    assert {name for name in got if "mu" in name}, "the optimizer's moments are compared too"
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert {n: [step for step, _ in shown] for n, shown in scalars(workdir).items()} == {
        n: [step for step, _ in shown] for n, shown in scalars(unbroken).items()
    }
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1, "steps 3 and 4 were not run again"
    for name, array in wanted.items():
        assert got[name].tobytes() == array.tobytes(), name


def test_a_resumed_run_may_be_computed_and_logged_in_another_way(
    unbroken: Path, killed: Path, new_config: NewConfig, tmp_path: Path
) -> None:
    workdir = Path(shutil.copytree(killed, tmp_path / "run"))
    config = new_config()
    config.mesh.fsdp, config.mesh.tensor = 4, 2
    config.model.remat, config.micro_batches = Remat.INPUTS, 2
    config.profile.steps, config.log = (), LogConfig()
    config.log_every, config.checkpoint_every, config.heldout_every, config.keep_checkpoints = 2, 0, 0, 1
    train(config, workdir)
    got, wanted = metrics(workdir), metrics(unbroken)
    assert list(got)[4:] == [5, 6, 8]
    last = [wanted[7], wanted[8]]
    mean = sum(m["loss"] * m["trained_tokens"] for m in last) / sum(m["trained_tokens"] for m in last)
    assert got[8]["loss"] == pytest.approx(mean, abs=1e-5)
    assert got[8]["trained_tokens"] == sum(m["trained_tokens"] for m in last)
    assert metrics(workdir, "heldout")[8] == pytest.approx(metrics(unbroken, "heldout")[8], abs=1e-4)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["8"]


def test_a_finished_run_is_left_alone(
    unbroken: Path, new_config: NewConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = Path(shutil.copytree(unbroken, tmp_path / "run"))
    train(new_config(), workdir)
    assert "already trained: step 8 of 8" in capsys.readouterr().out
    assert everything(workdir) == everything(unbroken)


def change_rate(config: RunConfig, data: Path) -> None:
    config.optim.learning_rate = 3e-4


def change_steps(config: RunConfig, data: Path) -> None:
    config.steps = 12


def change_seed(config: RunConfig, data: Path) -> None:
    config.seed = 1


def change_dropout(config: RunConfig, data: Path) -> None:
    config.model.dropout = 0.1


def change_dtype(config: RunConfig, data: Path) -> None:
    config.model.compute_dtype = "bfloat16"


def change_data(config: RunConfig, data: Path) -> None:
    config.data.train = str(data / "other.jsonl")


def change_tokenizer(config: RunConfig, data: Path) -> None:
    config.data.tokenizer = str(data / "other_tokenizer")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (change_rate, "config.optim.learning_rate was 0.01 and is 0.0003"),
        (change_steps, "config.steps was 8 and is 12"),
        (change_seed, "config.seed was 0 and is 1"),
        (change_dropout, "config.model.dropout was 0.0 and is 0.1"),
        (change_dtype, "config.model.compute_dtype was 'float32' and is 'bfloat16'"),
        (change_data, "data.digest was"),
        (change_tokenizer, "tokenizer was"),
    ],
)
def test_another_run_is_refused_and_the_work_directory_stays(
    unbroken: Path,
    data: Path,
    new_config: NewConfig,
    tmp_path: Path,
    change: Callable[[RunConfig, Path], None],
    key: str,
) -> None:
    workdir = Path(shutil.copytree(unbroken, tmp_path / "run"))
    config = new_config()
    change(config, data)
    with pytest.raises(UserError, match=rf"holds the checkpoints of another run: .*{key}"):
        train(config, workdir)
    before, after = everything(unbroken), everything(workdir)
    assert {name: after.get(name) for name in before} == before


def test_a_run_starts_from_the_weights_and_the_tokenizer_of_another_one(
    unbroken: Path, new_config: NewConfig, tmp_path: Path
) -> None:
    config = new_config()
    config.data.tokenizer, config.model.shape, config.model.init_from = "", None, str(unbroken)
    train(config, tmp_path / "second")
    assert metrics(tmp_path / "second", "heldout")[0] == metrics(unbroken, "heldout")[8]
    assert metrics(tmp_path / "second")[8]["loss"] < metrics(unbroken)[8]["loss"] - 0.5
    ours, theirs = (load_tokenizer(workdir / "tokenizer") for workdir in (tmp_path / "second", unbroken))
    assert ours.files == theirs.files


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(new_config: NewConfig, tmp_path: Path) -> None:
    config = new_config()
    config.optim.learning_rate, config.optim.warmup_steps, config.log_every = 1e30, 0, 4
    config.profile.steps, config.data.heldout = (1, 8), ""
    with pytest.raises(UserError, match=r"step 2: loss .*, gradient norm nan; .*learning_rate") as told:
        train(config, tmp_path / "run")
    assert list(metrics(tmp_path / "run")) == [1], "the log counts steps as the sentence does"
    loader = prepare(config, tmp_path / "run").loader
    wanted = [loader.dataset.record_ids[record] for _, _, _, record in loader.places(1)]
    assert f"Its batch: {', '.join(wanted[:5])}, ..." in str(told.value)
    assert f"the batch of {len(wanted)} records: {' '.join(wanted)}\n" in (tmp_path / "run" / "train.log").read_text()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb")), "the trace that was open is not lost"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("batch_size", 12, "batch_size 12 must be a multiple of 8 .* try --config.batch_size=8"),
        ("mesh.fsdp", 3, r"mesh \(replica 1, fsdp 3, .*\) needs exactly 3 devices, there are 8"),
        ("data.row_length", 256, "row_length 256 is longer than the model's 128 positions; try .*row_length=128"),
        ("optim.warmup_steps", 9, "warmup_steps 9 must lie between 0 and the run's 8 steps"),
        ("data.train", "none.jsonl", "none.jsonl: no such file"),
        ("data.tokenizer", "none", "none: no tokenizer.json or tokenizer.model there"),
        ("data.template", "alpaka", "unknown template 'alpaka'"),
        ("model.param_dtype", "bf16", "config.model.param_dtype must be one of float32, bfloat16, got 'bf16'"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(
    new_config: NewConfig, tmp_path: Path, path: str, value: object, sentence: str
) -> None:
    config = new_config()
    *parts, name = path.split(".")
    setattr(getattr(config, parts[0]) if parts else config, name, value)
    with pytest.raises(UserError, match=sentence):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(new_config: NewConfig, tmp_path: Path) -> None:
    config = new_config()
    fields = {name: getattr(config.model.shape, name) for name in config.model.shape.__slots__}
    config.model.shape = type(config.model.shape)(**fields | {"vocab_size": 376})
    with pytest.raises(UserError, match="the tokenizer has 384 ids, the model's vocab_size is 376"):
        train(config, tmp_path / "run")


def test_compiled_programs_are_kept_but_not_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        for folder, platform, kept in (
            ("", "gpu", before),
            ("~/programs", "cpu", before),
            ("~/programs", "gpu", f"{tmp_path}/programs"),
        ):
            keep_compiled(folder, platform)
            assert jax.config.jax_compilation_cache_dir == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
