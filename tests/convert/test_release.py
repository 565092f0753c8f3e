"""A model is released as its difference from the base, and whoever has the base gets back every bit, or a sentence."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from easylm_like.command import run_command
from easylm_like.convert.__main__ import main

from .conftest import SHAPES, convert

NewRun = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, new_run: NewRun) -> Path:
    place = tmp_path_factory.mktemp("base")
    convert("to-hf", new_run(place / "run", SHAPES["grouped"], 1), place / "hf", "--dtype=bfloat16")
    return place / "hf"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, new_run: NewRun) -> Path:
    """Return a model with other weights than the base and three ids more."""
    place = tmp_path_factory.mktemp("tuned")
    run = new_run(place / "run", SHAPES["grouped"], 2)
    convert("to-hf", run, place / "hf", "--dtype=bfloat16", "--vocab_size=387")
    return place / "hf"


@pytest.fixture(scope="module")
def difference(tmp_path_factory: pytest.TempPathFactory, base: Path, tuned: Path) -> Path:
    out = tmp_path_factory.mktemp("difference") / "diff"
    main(["difference", "make", f"--model={tuned}", f"--base={base}", f"--out={out}"])
    return out


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        run_command(main, ["difference", "recover", *arguments])
    assert end.value.code == 1
    return capsys.readouterr().err


def test_the_base_gives_every_bit_back_and_the_folder_is_whole(
    base: Path, tuned: Path, difference: Path, tmp_path: Path
) -> None:
    assert {array.dtype for array in load_file(difference / "difference.safetensors").values()} == {np.dtype("uint16")}
    assert not (difference / "config.json").exists(), "nobody can load a difference as a model"
    convert("to-orbax", base, tmp_path / "start")  # the base in another format is the same base
    start = f"--base={tmp_path / 'start'}"
    main(["difference", "recover", f"--difference={difference}", start, f"--out={tmp_path / 'hf'}"])
    wanted, got = (load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / "hf"))
    assert got.keys() == wanted.keys()
    assert got["lm_head.weight"].shape == (387, 24)
    for name, array in wanted.items():
        assert got[name].tobytes() == array.tobytes(), name
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "hf" / name).read_bytes() == (tuned / name).read_bytes(), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("a")["input_ids"]


def test_another_base_and_a_damaged_difference_write_nothing(
    tuned: Path, base: Path, difference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"--out={tmp_path / 'out'}"
    sentence = fails(capsys, f"--difference={difference}", f"--base={tuned}", out)
    assert "is not the base of this difference" in sentence
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    (copy / "files.json").unlink()
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"].view(np.uint16)[3] ^= 1
    save_file(weights, copy / "model.safetensors")
    sentence = fails(capsys, f"--difference={difference}", f"--base={copy}", out)
    assert "copy is not the base of this difference: the checksum of its weights is" in sentence
    damaged = Path(shutil.copytree(difference, tmp_path / "damaged"))
    content = bytearray((damaged / "difference.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "difference.safetensors").write_bytes(content)
    for _ in range(2):
        assert "damaged" in fails(capsys, f"--difference={damaged}", f"--base={base}", out)
        (damaged / "files.json").unlink(missing_ok=True)  # the checksum of the result finds it too
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "damaged"}


def test_a_difference_of_numbers_is_added_and_its_sum_told(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wdiff = Path(shutil.copytree(tuned, tmp_path / "wdiff"))
    for name in ("files.json", "conversion.json"):
        (wdiff / name).unlink()
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base, tuned))
    old.resize_token_embeddings(387, mean_resizing=False)
    weights, mine = new.state_dict(), old.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # as weight_diff.py does it
        mine[name][384:] = mine[name][:384].mean(dim=0, keepdim=True)
    wanted = {name: weights[name].numpy().copy() for name in weights}
    save_file({name: (weights[name] - mine[name]).numpy() for name in weights}, wdiff / "model.safetensors")
    arguments = [f"--difference={wdiff}", f"--base={base}", f"--out={tmp_path / 'hf'}"]
    main(["difference", "recover", *arguments])
    told = re.search(r"The sum of the weights is ([-\d.]+),", capsys.readouterr().out)
    assert told
    assert float(told[1]) == pytest.approx(sum(float(w.sum(dtype=np.float64)) for w in wanted.values()), abs=1e-3)
    for name, array in load_file(tmp_path / "hf" / "model.safetensors").items():
        np.testing.assert_allclose(array, wanted[name], atol=1e-6, err_msg=name)
    assert json.loads((tmp_path / "hf" / "conversion.json").read_text())["from"]["format"] == "difference"
