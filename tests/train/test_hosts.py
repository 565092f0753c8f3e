"""One run on two hosts, here processes with four pretended devices each, against the same run on one with eight."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from easylm_like.train.checkpoint import load_params, saved_steps
from easylm_like.train.config import RunConfig, SampleConfig
from easylm_like.train.loop import train
from easylm_like.train.stop import EXIT_SAVED

pytestmark = pytest.mark.usefixtures("compile_fast")

NewConfig = Callable[[], RunConfig]

# `python -m easylm_like.train`, which tells how many rows it makes and can send itself SIGTERM at a step.
HOST = """
import os, runpy, signal, sys, time
from easylm_like.data.loader import Loader
from easylm_like.train.runlog import RunLog

last, make, write = int(sys.argv.pop(1)), Loader.batch, RunLog.metrics

def make_and_tell(loader, step):
    batch = make(loader, step)
    print("made", len(batch.tokens), "rows", flush=True)
    return batch

def write_and_terminate(log, step, kind, values):
    write(log, step, kind, values)
    if step == last:
        os.kill(os.getpid(), signal.SIGTERM)
    if step >= last > 0:
        time.sleep(1)  # it takes a moment until the hosts know of it: the run must not be over by then

Loader.batch, RunLog.metrics = make_and_tell, write_and_terminate
runpy.run_module("easylm_like.train", run_name="__main__")
"""
GET_CONFIG = """
import pickle
from pathlib import Path

def get_config(variant=""):
    return pickle.loads(Path(__file__).with_suffix(".pickle").read_bytes())
"""


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    error: str

    def made(self) -> set[str]:
        """Return how many rows it made at a time."""
        return {line for line in self.out.splitlines() if line.startswith("made")}


def run_hosts(config: RunConfig, workdir: Path, programs: list[list[str]], flags: list[list[str]]) -> list[Ended]:
    """Run the programs as the hosts of one run, each with its own flags, the last of which count."""
    workdir.with_suffix(".pickle").write_bytes(pickle.dumps(config))
    workdir.with_suffix(".py").write_text(GET_CONFIG)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = [f"--config={workdir.with_suffix('.py')}", f"--workdir={workdir}"]
    shared += [f"--coordinator=127.0.0.1:{port}", f"--hosts={len(programs)}"]
    environment = os.environ | {
        "PYTHONPATH": ":".join(sys.path),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
    }
    hosts = [
        subprocess.Popen(
            [sys.executable, *program, *shared, f"--host={number}", *own],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for number, (program, own) in enumerate(zip(programs, flags, strict=True))
    ]  # fmt: skip
    try:
        told = [host.communicate(timeout=300) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    return [Ended(host.returncode, *texts) for host, texts in zip(hosts, told, strict=True)]


def numbers(workdir: Path, kind: str) -> dict[int, dict[str, float]]:
    """Return the losses that a run wrote down, by step."""
    names = ("loss", "grad_norm", "trained_tokens") if kind == "train" else ("all", "ann/good", "bob/bad")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: {name: line[name] for name in names} for line in lines if line["kind"] == kind}


def assert_same_end(workdir: Path, wanted: Path) -> None:
    """Compare every step's losses and the weights after the last."""
    for step, values in numbers(wanted, "train").items():
        assert numbers(workdir, "train")[step] == pytest.approx(values, abs=1e-5), step
    weights = load_params(workdir / "checkpoints", 8)
    for name, weight in load_params(wanted / "checkpoints", 8).items():
        np.testing.assert_allclose(weights[name], weight, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def new_config(new_config: NewConfig) -> NewConfig:
    """Return a function that makes the shared run, which looks and saves before the first and after the last step."""

    def make() -> RunConfig:
        config = new_config()
        config.checkpoint_every = config.heldout_every = 0
        config.batch_size, config.micro_batches = 16, 2
        config.optim.eps = 1e-4  # signs of 1e-9 are noise
        config.samples = SampleConfig(prompts=("What is 1 and 2?",), max_new=8)
        return config

    return make


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, new_config: NewConfig) -> Path:
    """Return the work directory of the run on one host."""
    workdir = tmp_path_factory.mktemp("hosts") / "alone"
    assert train(new_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, new_config: NewConfig) -> tuple[Path, list[Ended]]:
    """Return the work directory of the run on two hosts, the second of which was sent SIGTERM in step 2."""
    workdir = tmp_path_factory.mktemp("hosts") / "stopped"
    config = new_config()
    config.samples.prompts = ()
    return workdir, run_hosts(config, workdir, [["-c", HOST, "0"], ["-c", HOST, "2"]], [[], []])


@pytest.mark.slow
def test_a_signal_to_one_host_ends_all_at_the_same_step(stopped: tuple[Path, list[Ended]], alone: Path) -> None:
    workdir, hosts = stopped
    assert [host.status for host in hosts] == [EXIT_SAVED] * 2, hosts
    (saved,) = saved_steps(workdir / "checkpoints")
    assert f"stopped by SIGTERM; step {saved} of 8 is saved" in hosts[0].out
    got, wanted = numbers(workdir, "train"), numbers(alone, "train")
    assert list(got) == list(range(1, saved + 1))
    for step, values in got.items():
        assert values == pytest.approx(wanted[step], abs=1e-5), step
    assert numbers(workdir, "heldout")[0] == pytest.approx(numbers(alone, "heldout")[0], abs=1e-5)
    assert [host.made() for host in hosts] == [{"made 8 rows", "made 4 rows"}] * 2, "half of 16, and of 8 held-out ones"


@pytest.mark.slow
def test_a_run_of_two_hosts_goes_on_on_one(
    stopped: tuple[Path, list[Ended]], alone: Path, new_config: NewConfig, tmp_path: Path
) -> None:
    workdir, config = Path(shutil.copytree(stopped[0], tmp_path / "run")), new_config()
    config.mesh.tensor, config.data.heldout, config.samples.prompts = 2, "", ()
    assert train(config, workdir)
    assert_same_end(workdir, alone)


@pytest.mark.slow
def test_a_run_goes_on_on_hosts_that_share_rows(
    stopped: tuple[Path, list[Ended]], alone: Path, new_config: NewConfig, tmp_path: Path
) -> None:
    workdir, config = Path(shutil.copytree(stopped[0], tmp_path / "run")), new_config()
    mesh = ["--config.mesh.sequence=4", "--config.mesh.tensor=2"]
    hosts = run_hosts(config, workdir, [["-c", HOST, "0"]] * 2, [mesh] * 2)
    assert [host.status for host in hosts] == [0, 0], hosts
    assert [host.made() for host in hosts] == [{"made 16 rows", "made 8 rows"}] * 2
    assert_same_end(workdir, alone)
    assert numbers(workdir, "heldout")[8] == pytest.approx(numbers(alone, "heldout")[8], abs=1e-5)
    answers, wanted = ((folder / "samples.jsonl").read_text().splitlines()[-2:] for folder in (workdir, alone))
    assert answers == wanted


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ("--config.data.train=none.jsonl", "--config.data.train=none.jsonl", "error: none.jsonl: no such file"),
        ("--workdir=own/0", "--workdir=own/1", "error: host 1: own/1: it lacks what the first host wrote there"),
    ],
    ids=["the first", "another"],
)
def test_a_mistake_that_one_host_finds_ends_all_with_one_sentence(
    new_config: NewConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    hosts = run_hosts(new_config(), tmp_path / "run", [["-m", "easylm_like.train"]] * 2, [[first], [second]])
    for host in hosts:
        assert host.status == 1
        assert host.error.splitlines()[-1].startswith(sentence)
        assert "Traceback" not in host.error
    assert not list(tmp_path.rglob("config.json"))
