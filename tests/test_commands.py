"""Bad input as a user meets it: one clear sentence on stderr, a status that is not zero, and nothing half-written."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MIXTURE = """
from data_prep.config import Format, MixtureConfig, Source

def get_config(variant: str = "") -> MixtureConfig:
    return MixtureConfig(sources=(Source(format=Format.CONVERSATIONS, path={path!r}),))
"""
RUN = """
from easylm_like.model.config import LlamaConfig
from easylm_like.train.config import DataConfig, ModelConfig, RunConfig

def get_config(variant: str = "") -> RunConfig:
    config = RunConfig(steps=4, batch_size=8)
    config.data = DataConfig(train={path!r}, tokenizer={tokenizer!r}, row_length=64)
    shape = LlamaConfig(vocab_size=512, d_model=16, d_ff=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4)
    config.model = ModelConfig(shape=shape)
    return config
"""
LINE = '{"id": "a", "source": "s", "messages": [{"role": "assistant", "content": "a document"}]}\n'

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(shared_data: Path, tmp_path: Path) -> Run:
    """Return a function that runs a module in a folder with a config of each kind and a broken file of conversations.

    TMP in an argument stands for that folder.
    """
    (tmp_path / "broken.jsonl").write_text(LINE * 2 + LINE[:40] + "\n" + LINE)
    tokenizer = str(shared_data / "models" / "stories260K-hf")
    path = str(tmp_path / "broken.jsonl")
    (tmp_path / "mixture.py").write_text(MIXTURE.format(path=path))
    (tmp_path / "run.py").write_text(RUN.format(path=path, tokenizer=tokenizer))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *(word.replace("TMP", str(tmp_path)) for word in words)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return start


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one sentence of a command that must have failed."""
    assert result.returncode == 1, result.stderr
    sentences = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(sentences) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return sentences[0]


def test_a_malformed_line_is_named_by_file_and_line(run: Run, tmp_path: Path) -> None:
    place = f"error: {tmp_path}/broken.jsonl:3: not JSON"
    assert error_of(run("data_prep", "build", "--config=TMP/mixture.py", "--out=TMP/out")).startswith(place)
    assert error_of(run("easylm_like.train", "--config=TMP/run.py", "--workdir=TMP/out")).startswith(place)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_field_that_does_not_exist_is_named(run: Run, tmp_path: Path) -> None:
    argument = "--config.optim.lerning_rate=1"
    assert "lerning_rate" in error_of(run("easylm_like.train", "--config=TMP/run.py", "--workdir=TMP/out", argument))
    assert not (tmp_path / "out").exists()


def test_a_batch_that_the_devices_cannot_share_is_told_with_one_that_they_can(run: Run, tmp_path: Path) -> None:
    arguments = ("--config=TMP/run.py", "--workdir=TMP/out", "--config.batch_size=12")
    sentence = error_of(run("easylm_like.train", *arguments))
    assert "batch_size 12 must be a multiple of 8" in sentence
    assert sentence.endswith("try --config.batch_size=8")
    assert not (tmp_path / "out").exists()


def test_a_weight_file_that_was_cut_off_is_named(run: Run, shared_data: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(shared_data / "models" / "stories260K-hf", tmp_path / "model"))
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole[:500_000])
    sentence = error_of(run("easylm_like.convert", "to-hf", "--model=TMP/model", "--out=TMP/out"))
    assert sentence.startswith(f"error: {weights}: damaged or cut off")
    assert not list(tmp_path.glob("*out*"))
