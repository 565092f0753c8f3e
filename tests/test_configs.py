"""Every config loads with every variant that it names, and the README's commands run, in short, one after the other."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from transformers import AutoModelForCausalLM

from data_prep.build import build
from data_prep.config import MixtureConfig
from easylm_like.config_file import read_flags
from easylm_like.errors import UserError
from easylm_like.train.config import Optimizer, RunConfig, check_batch, check_run

# ml_collections 1.1 imports a config file in a way that Python wants to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

VARIANTS = {"koala_tiny": ("", "debug"), "koala_stories": ("", "smollm2", "debug")}
MIXTURES = ("koala_tiny", "koala_stories")  # their variant is the folder
RECIPES = {  # NAME,FOLDER: those that are tried with what the test data has
    "koala": ("debug",),
    "alpaca": ("debug",),
    "vicuna": ("debug",),
    "hindsight": ("debug", "debug_aux"),
}

TINY_REPORT = (
    "eval report --model=runs/koala_tiny/hf --data=runs/koala_tiny/data/heldout.jsonl"
    " --run=runs/koala_tiny --out=runs/koala_tiny/report --score --row_length=128"
)
STORIES_REPORT = (
    "eval report --model=runs/koala_stories/hf --baseline=runs/koala_stories/start"
    " --data=runs/koala_stories/data/heldout.jsonl --run=runs/koala_stories --out=runs/koala_stories/report --limit=40"
)
TINY = (
    "data_prep demo --out=runs/koala_tiny/raw",
    "data_prep build --config=configs/data/koala_tiny.py --out=runs/koala_tiny/data",
    "data_prep tokenizer --data=runs/koala_tiny/data/train.jsonl --vocab_size=1024 --out=runs/koala_tiny/tokenizer",
    "easylm_like.train --config=configs/koala_tiny.py --workdir=runs/koala_tiny",
    "easylm_like.convert to-hf --model=runs/koala_tiny --out=runs/koala_tiny/hf",
    TINY_REPORT,
)
STORIES = (
    "data_prep build --config=configs/data/koala_stories.py:DATA --out=runs/koala_stories/data",
    "easylm_like.convert to-orbax --model=DATA/models/stories260K-hf --out=runs/koala_stories/start --template=koala",
    "easylm_like.train --config=configs/koala_stories.py --workdir=runs/koala_stories",
    "easylm_like.convert to-hf --model=runs/koala_stories --out=runs/koala_stories/hf",
    STORIES_REPORT,
)
LOOKING = (
    "data_prep build --config=configs/data/koala.py:distill,FOLDER --out=runs/koala/data",
    "data_prep stats runs/koala/data --out=runs/koala/stats.png",
    "data_prep show  runs/koala/data --html=runs/koala/look.html",
    "data_prep why   sharegpt-17 --data=runs/koala/data",
)
# What makes a command of the README short enough for a test.
SHORTER = {
    "configs/koala_tiny.py": "configs/koala_tiny.py:debug --config.model.scan_layers=True",
    "--score": "--score --limit=6 --max_new=8",
    "configs/koala_stories.py": "configs/koala_stories.py --config.steps=40 --config.data.row_length=128"
    " --config.heldout_every=0 --config.optim.warmup_steps=5",
    "--out=runs/koala_stories/data": "--out=runs/koala_stories/data "
    + " ".join(f"--config.sources[{i}].limit=60 --config.sources[{i}].heldout_fraction=0.25" for i in range(5)),
    "--limit=40": "--limit=5 --max_new=8 --row_length=128",
}


def test_every_config_is_tried(root: Path) -> None:
    assert {path.stem for path in (root / "configs").glob("*.py")} == set(VARIANTS)
    assert {path.stem for path in (root / "configs" / "data").glob("*.py")} == {*MIXTURES, *RECIPES}


@pytest.mark.parametrize(("name", "variant"), [(name, v) for name, variants in VARIANTS.items() for v in variants])
def test_a_run_loads_and_is_right_but_for_its_files(root: Path, name: str, variant: str) -> None:
    path = root / "configs" / f"{name}.py"
    assert variant in path.read_text().split('"""')[1], "its docstring names the variant"
    config, others = read_flags([f"--config={path}:{variant}", "--workdir=here"], RunConfig, {"workdir": ""})
    check_run(config)
    check_batch(config, {"replica": 1, "fsdp": 8, "sequence": 1, "tensor": 1})
    assert others == {"workdir": "here"}
    assert config.steps > 100 or variant == "debug"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_that_does_not_exist_is_an_error(root: Path, name: str) -> None:
    argv = [f"--config={root}/configs/{name}.py:debgu", "--workdir=here"]
    with pytest.raises(UserError, match="debgu"):
        read_flags(argv, RunConfig, {"workdir": ""})


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_takes_its_folder_from_the_variant(root: Path, name: str) -> None:
    path = root / "configs" / "data" / f"{name}.py"
    config, _ = read_flags([f"--config={path}:/elsewhere"], MixtureConfig, {})
    assert config.sources
    assert all(source.path.startswith("/elsewhere/") and source.licence for source in config.sources)
    default, _ = read_flags([f"--config={path}"], MixtureConfig, {})
    assert not any(source.path.startswith("/elsewhere/") for source in default.sources)


KOALA = [f"{name}_{signs}" for name in ("open", "feedback", "all") for signs in ("po", "pn")]


@pytest.mark.parametrize(("name", "variant"), [("koala", v) for v in ["distill", *KOALA]] + [("hindsight", "aux")])
def test_a_recipe_takes_its_native_files_from_a_folder(root: Path, name: str, variant: str) -> None:
    path = root / "configs" / "data" / f"{name}.py"
    config, _ = read_flags([f"--config={path}:{variant},/elsewhere"], MixtureConfig, {})
    files = {source.path for source in config.sources if source.format != "identity"}
    assert all(file.startswith("/elsewhere/") for file in files)
    assert all(source.licence for source in config.sources)
    assert (config.feedback == "positive") == variant.endswith("_po")
    with pytest.raises(UserError, match="no such file"):
        config.check()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), [(name, v) for name, variants in RECIPES.items() for v in variants])
def test_a_recipe_builds_from_real_files(
    root: Path, tmp_path: Path, shared_data: Path, name: str, variant: str
) -> None:
    path = root / "configs" / "data" / f"{name}.py"
    limit = [f"--config.sources[0].limit={300 if name == 'vicuna' else 0}"]
    config, _ = read_flags([f"--config={path}:{variant},{shared_data}", *limit], MixtureConfig, {})
    assert build(config, tmp_path / "out")
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]
    assert set(counts) == {source.label for source in config.sources}
    assert all(source["train"] > 0 for source in counts.values())
    with pytest.raises(UserError, match="unknown variant 'debgu'"):
        read_flags([f"--config={path}:debgu"], MixtureConfig, {})


@pytest.mark.slow
def test_data_is_built_and_looked_at(place: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("data_prep.__main__").main
    main(["sniff", str(shared_data / "hh_rlhf" / "harmless-base_test_0000-1499.jsonl.gz")])
    for command in LOOKING:
        main(shlex.split(command.replace("distill,FOLDER", f"debug,{shared_data}"))[1:])
    printed = capsys.readouterr().out
    assert "hh\nwhy: chosen and rejected are transcripts" in printed
    assert "written: sharegpt-17 is line" in printed
    assert matplotlib.image.imread(place / "runs" / "koala" / "stats.png").std() > 0.05
    assert "sharegpt-17" in (place / "runs" / "koala" / "look.html").read_text("utf-8")


def test_a_field_is_overridden_with_its_own_type(root: Path) -> None:
    fields = ("optim.schedule=linear", "optim.learning_rate=1e-3", "mesh.fsdp=4", "model.remat=inputs", "steps=7")
    fields += ("optim.optimizer=muon", "profile.steps=10,13", "log.tensorboard")
    argv = [f"--config={root}/configs/koala_tiny.py", "--workdir=w", *(f"--config.{field}" for field in fields)]
    config, _ = read_flags(argv, RunConfig, {"workdir": ""})
    got = (config.optim.schedule, config.optim.learning_rate, config.mesh.fsdp, config.model.remat, config.steps)
    assert got == ("linear", 1e-3, 4, "inputs", 7)
    assert {type(value).__name__ for value in got} == {"Schedule", "float", "int", "Remat"}
    assert (config.optim.optimizer, config.profile.steps) == (Optimizer.MUON, (10, 13))
    assert config.log.tensorboard is True


@pytest.mark.checkout
@pytest.mark.parametrize("file", ["README.md", "Makefile"])
def test_these_are_the_commands_that_people_are_told(root: Path, file: str) -> None:
    text = re.sub(r"\\\n\s+", "", (root / file).read_text())
    told = [line.partition("  # ")[0].strip() for line in re.findall(r"(?:python|\$\(python\)) -m (.*)", text)]
    for command in TINY if file == "Makefile" else TINY + STORIES + LOOKING:
        assert command in told


def shorten(command: str) -> list[str]:
    """Return the words of a command of the README, made short enough for a test."""
    for long, short in SHORTER.items():
        command = re.sub(rf"{re.escape(long)}(?= |$)", short, command)
    return shlex.split(command)


@pytest.fixture
def place(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder to run commands in, which knows of configs/ only."""
    (tmp_path / "configs").symlink_to(root / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_small_koala_goes_from_raw_dialogues_to_a_report(place: Path) -> None:
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])  # one device, as at home
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": flags}
    printed = []
    for command in TINY:
        words = [sys.executable, "-m", *shorten(command)]
        result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        printed.append(result.stdout)
    koala = place / "runs" / "koala_tiny"
    assert "step      4/4" in printed[3]
    assert "logits at" in printed[4]
    assert "ids equal" in printed[4]
    report = json.loads((koala / "report" / "report.json").read_text())
    assert set(report["accuracy"]) == {"good", "bad"}
    assert set(report["heldout_loss"]) == {"all", "alpaca/good", "sharegpt/good", "hh/good", "hh/bad"}
    for name in ("data", "checkpoints", "model", "report"):
        assert re.search(rf"{name}: +runs/koala_tiny", printed[5])
    assert matplotlib.image.imread(koala / "report" / "curves.png").std() > 0.05
    assert AutoModelForCausalLM.from_pretrained(koala / "hf").num_parameters() > 1_000_000


@pytest.mark.slow
def test_a_real_model_gets_better_at_real_dialogues(place: Path, shared_data: Path) -> None:
    for command in STORIES:
        module, *words = shorten(command.replace("DATA", str(shared_data)))
        importlib.import_module(f"{module}.__main__").main(words)
    stories = place / "runs" / "koala_stories"
    report = json.loads((stories / "report" / "report.json").read_text())
    before, after = report["heldout_loss_before"], report["heldout_loss"]
    assert after["all"] < before["all"] - 0.2
    assert {name.split("/")[0] for name in after} == {"all", "alpaca", "sharegpt", "hc3", "hh", "oasst"}
    assert {"hh/good", "hh/bad"} <= set(after)
    answers = [json.loads(line) for line in (stories / "report" / "answers_bad.jsonl").read_text().splitlines()]
    assert {answer["source"] for answer in answers} == {"alpaca", "sharegpt", "hc3", "hh", "oasst"}
    assert any(answer["text"] for answer in answers)
    counts = json.loads((stories / "data" / "manifest.json").read_text())["sources"].values()
    assert all(0 < source["heldout"] < source["train"] < 60 for source in counts)
