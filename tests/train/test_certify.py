"""The certificate: kills meet a run wherever it is, equal runs are certified, and others are told apart."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from easylm_like.config_file import read_flags
from easylm_like.errors import UserError
from easylm_like.train.__main__ import main
from easylm_like.train.certify import Moment, ShortRun, certify, differences, short_run
from easylm_like.train.checkpoint import load_arrays
from easylm_like.train.config import RunConfig, check_run
from easylm_like.train.fingerprint import fingerprint
from easylm_like.train.optim import make_schedule

# ml_collections 1.1 imports a config file in a way that Python wants to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

# A trainer of 40 steps that takes a second. Its weight is a hash of the steps it took; it saves every 10th, slowly.
TOY = """
import json, sys, time
from pathlib import Path

mode, workdir = sys.argv[1], Path(sys.argv[-1].removeprefix("--workdir="))
folder, metrics = workdir / "checkpoints", workdir / "metrics.jsonl"
folder.mkdir(parents=True, exist_ok=True)
first = max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
weight = int((folder / str(first)).read_text()) if first else 1
lines = metrics.read_text().splitlines()[:first] if metrics.exists() else []
if sys.argv[2] == "fingerprint":
    losses = {f"train {step}": int(line) for step, line in enumerate(lines, 1)}
    print(json.dumps({"step": first, "params": {"w": weight}, "optimizer": {"m": 0}, "rng": "r", "losses": losses}))
    sys.exit()
if mode == "breaks":
    sys.exit("error: no such data")
if mode == "forgets":
    weight = 1
time.sleep(0.1)
for path in folder.glob("*.partial"):
    path.unlink()
for step in range(first + 1, 41):
    weight = (31 * weight + step) % 1000003
    lines.append(str(weight))
    print(f"step {step:6}/40  loss {weight}", flush=True)
    (workdir / "new").write_text("".join(line + chr(10) for line in lines))
    (workdir / "new").replace(metrics)
    if step % 10 == 0:
        (folder / f"{step}.partial").write_text(str(weight))
        time.sleep(0.2)
        (folder / f"{step}.partial").rename(folder / str(step))
    time.sleep(0.005)
"""

CONFIG = """from easylm_like.model.config import LlamaConfig
from easylm_like.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, Schedule

def get_config(variant=""):
    config = RunConfig(steps=1000, batch_size=8, checkpoint_every=300, milestone_every=600)
    config.data = DataConfig(train="{data}/train.jsonl", tokenizer="{data}/tokenizer", row_length=64)
    config.model = ModelConfig(dropout=0.1, shape=LlamaConfig(
        vocab_size=384, d_model=16, d_ff=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, max_length=128
    ))
    config.optim = OptimConfig(learning_rate=1e-2, warmup_steps=100, schedule=Schedule.WSD, decay_steps=200)
    config.log.wandb_project, config.profile.steps = "project", (3, 5)
    return config
"""


@pytest.fixture
def toy(tmp_path: Path) -> Callable[[str], ShortRun]:
    """Return a function that makes the toy trainer: one that is right, forgets, or breaks."""
    (tmp_path / "toy.py").write_text(TOY)
    return lambda mode: ShortRun([], 40, (sys.executable, str(tmp_path / "toy.py"), mode))


@pytest.fixture(scope="module")
def config_file(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(CONFIG.replace("{data}", str(data)))
    return path


def test_kills_meet_steps_saves_and_starts_all_over_the_run(
    toy: Callable[[str], ShortRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certify(tmp_path / "proof", toy("is right"), kills=6, seed=0)
    certificate = json.loads((tmp_path / "proof" / "certificate.json").read_text())
    assert certificate["equal"] is True
    assert certificate["both runs"]["step"] == 40
    assert len(certificate["both runs"]["losses"]) == 40
    kills = certificate["kills"]
    assert [kill["moment"] for kill in kills] == [*Moment, *Moment]
    assert [kill["told_step"] > 0 for kill in kills if kill["moment"] != Moment.START] == [True] * 4
    assert kills[3]["told_step"] > 20, "the second half was killed in its turn"
    assert kills[5]["saved"][-1] >= 10, "and went on from a checkpoint"
    assert any(kill["unfinished"] for kill in kills if kill["moment"] == Moment.SAVE)
    told = (tmp_path / "proof" / "killed.log").read_text().splitlines()
    assert sum("loss" in line for line in told) > 40, "steps were taken again"
    assert "equal to the bit after 6 kills: 1 weights" in capsys.readouterr().out


def test_a_run_that_forgets_at_a_kill_gets_no_certificate(toy: Callable[[str], ShortRun], tmp_path: Path) -> None:
    sentence = (
        r"the run that was killed is another one.* Not equal: params \(w: 1 of 1\), losses \(train \d+, .*\d of 40\)"
    )
    with pytest.raises(UserError, match=sentence):
        certify(tmp_path / "proof", toy("forgets"), kills=3, seed=1)
    assert not (tmp_path / "proof" / "certificate.json").exists()


def test_a_run_that_breaks_is_named_with_its_last_words(toy: Callable[[str], ShortRun], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"proof/unbroken: the run ended with status 1: error: no such data"):
        certify(tmp_path / "proof", toy("breaks"), kills=3, seed=0)


def test_a_difference_is_named_where_it_begins() -> None:
    same = {"step": 4, "rng": "r", "params": {"q": "1", "k": "2"}, "losses": {f"train {n}": n for n in range(1, 9)}}
    assert differences(same, json.loads(json.dumps(same))) == []
    losses = same["losses"] | {"train 4": 0, "train 6": 0, "train 7": 0, "train 8": 0}
    assert differences(same, same | {"losses": losses}) == ["losses (train 4, train 6, train 7, ...: 4 of 8)"]
    assert differences(same, same | {"step": 3, "params": {"k": "2"}}) == ["step", "params (q: 1 of 2)"]
    assert differences(same, same | {"params": same["params"] | {"v": "3"}}) == ["params (v: 1 of 3)"]


@pytest.mark.parametrize("steps", [1, 2, 8, 1500])
def test_a_short_run_is_one_that_the_trainer_takes(config_file: Path, steps: int) -> None:
    argv = [f"--config={config_file}", "--workdir=w", "--config.seed=3", "--config.batch_size", "16", "--kills=2"]
    config, _ = read_flags(argv, RunConfig, {"workdir": ""}, {"kills": (3, "")})
    short, _ = read_flags([*short_run(config, argv, steps).arguments, "--workdir=w"], RunConfig, {"workdir": ""})
    check_run(short)
    make_schedule(short.optim, short.steps)
    assert (short.steps, short.seed, short.batch_size, short.log_every) == (steps, 3, 16, 1)
    assert steps // short.checkpoint_every >= min(steps, 4)
    assert (short.log.wandb_project, short.profile.steps) == ("", ())


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--kills=0", "--kills must be at least 1, got 0"),
        ("--steps=-1", "--steps must be at least 1, or 0 for all of config.steps, got -1"),
        ("--kills=many", "flag --kills=many"),
        ("--seed=1.5", "flag --seed=1.5"),
        ("--kill=2", "Unknown command line flag 'kill'"),
    ],
)
def test_a_wrong_flag_is_told_before_anything_runs(config_file: Path, tmp_path: Path, flag: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        main(["verify-resume", f"--config={config_file}", f"--workdir={tmp_path / 'proof'}", flag])
    assert not (tmp_path / "proof").exists()


def test_a_folder_with_something_in_it_is_left_alone(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("a run's\n")
    with pytest.raises(UserError, match="is not empty; verify-resume makes two runs there: give it a new --workdir"):
        main(["verify-resume", f"--config={config_file}", f"--workdir={tmp_path}"])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def change_last_bit(folder: Path, name: str) -> None:
    """Change one number of one array in params/ or optimizer/ of a checkpoint by the least that there is."""
    named, structure = jax.tree.flatten_with_path(load_arrays(folder))
    arrays = {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in named}
    number = arrays[name].reshape(-1)
    number[0] = np.nextafter(number[0], np.float32(np.inf))
    shutil.rmtree(folder)
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(folder, jax.tree.unflatten(structure, arrays.values()))


@pytest.mark.slow
def test_the_trainer_is_certified_and_the_least_change_would_not_be(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    devices = jax.device_count()  # here; the runs have one, which is quicker
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    argv = [f"--config={config_file}", f"--workdir={tmp_path / 'proof'}"]
    main(["verify-resume", *argv, "--steps=8", "--kills=2"])
    assert "equal to the bit after 2 kills: 12 weights" in capsys.readouterr().out
    certificate = json.loads((tmp_path / "proof" / "certificate.json").read_text())
    assert [kill["moment"] for kill in certificate["kills"]] == [Moment.STEPS, Moment.SAVE]
    assert {f"--config={config_file}", "--config.steps=8"} <= set(certificate["command"])
    wanted, killed = certificate["both runs"], tmp_path / "proof" / "killed"
    assert wanted["step"] == 8
    assert list(wanted["losses"]) == [f"train {step}" for step in range(1, 9)]
    assert {"jax", "orbax-checkpoint"} <= wanted["versions"].keys()

    arguments = certificate["command"][len(ShortRun([], 8).train) :]
    config, _ = read_flags([*arguments, "--workdir=w"], RunConfig, {"workdir": ""})
    assert differences(wanted, json.loads(json.dumps(fingerprint(config, killed)))) == ["mesh (fsdp: 1 of 4)"]
    wanted["mesh"]["fsdp"] = devices
    change_last_bit(killed / "checkpoints" / "8" / "params", "['q']")
    assert differences(wanted, fingerprint(config, killed)) == ["params (['q']: 1 of 12)"]
    moment = next(name for name in wanted["optimizer"] if "nu" in name and "'up'" in name)
    change_last_bit(killed / "checkpoints" / "8" / "optimizer", moment)
    rows = (killed / "metrics.jsonl").read_text().splitlines()
    (killed / "metrics.jsonl").write_text("\n".join([*rows[:4], rows[4].replace('"loss": ', '"loss": 1'), *rows[5:]]))
    config.seed = 1
    assert differences(wanted, fingerprint(config, killed)) == [
        "params (['q']: 1 of 12)",
        f"optimizer ({moment}: 1 of {len(wanted['optimizer'])})",
        "rng",
        "next 100 batches",
        "losses (train 5: 1 of 8)",
    ]
