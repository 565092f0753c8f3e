"""Where a run begins: what model.init_from may name, and that the weights which it names are those that it gets."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import optax
import pytest

from easylm_like.errors import UserError
from easylm_like.hf.keys import as_stacks
from easylm_like.model.config import Compute, LlamaConfig
from easylm_like.model.llama import Params
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.train.checkpoint import save_params, shape_to_json
from easylm_like.train.config import OptimConfig
from easylm_like.train.optim import make_optimizer
from easylm_like.train.start import Start, find_start
from easylm_like.train.state import abstract_state

from .conftest import Twin

ADAMW = make_optimizer(OptimConfig(), optax.constant_schedule(0.1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shape: LlamaConfig, params: Params) -> Path:
    """Return the work directory of a run with the checkpoints of steps 0 and 4, whose weights are twice as large."""
    folder = tmp_path_factory.mktemp("starts") / "run"
    for step, factor in ((0, 1), (4, 2)):
        arrays = {name: np.asarray(weight) * factor for name, weight in params.items()}
        save_params(folder / "checkpoints", as_stacks(arrays), {"shape": shape_to_json(shape)}, step)
    (folder / "tokenizer").mkdir()
    (folder / "config.json").write_text("{}")  # a run has one too, and it is not Hugging Face's
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, twin: Twin, params: Params) -> Path:
    """Return a Hugging Face folder that transformers has written."""
    folder = tmp_path_factory.mktemp("theirs") / "7"  # a name like a checkpoint's makes none
    twin.model(params).save_pretrained(folder)
    return folder


def test_a_start_is_a_run_one_of_its_checkpoints_or_a_hugging_face_folder(
    run: Path, theirs: Path, shape: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, tokenizer = run / "checkpoints", run / "tokenizer"
    assert find_start(str(run)) == Start(checkpoints, 4, shape, tokenizer)
    assert find_start(f"{checkpoints}/0/") == Start(checkpoints, 0, shape, tokenizer)
    found = find_start(str(theirs))
    assert (found.path, found.step, found.tokenizer) == (theirs, None, theirs)
    assert found.shape == replace(shape, max_length=found.shape.max_length)
    for folder, step in ((run, 4), (checkpoints / "0", 0)):
        monkeypatch.chdir(folder)
        assert find_start(".") == Start(checkpoints, step, shape, tokenizer)


def test_what_is_no_start_is_told_what_would_be_one(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints" / "4", tmp_path / "4.damaged")
    (tmp_path / "file").write_text("{}")
    for name in (tmp_path, tmp_path / "none", tmp_path / "file", tmp_path / "4.damaged", run / "checkpoints"):
        with pytest.raises(UserError, match=f"^model.init_from {name}: expected a run's work directory .+ or a Hugg"):
            find_start(str(name))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint of step any"):
        find_start(str(tmp_path))


def test_the_weights_of_each_start_are_those_it_names_on_eight_devices(
    run: Path, theirs: Path, shape: LlamaConfig, params: Params
) -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    for name, factor in ((run, 2), (run / "checkpoints" / "0", 1), (theirs, 1)):
        for dtype in ("float32", "bfloat16"):
            like = abstract_state(replace(shape, compute=Compute(param_dtype=dtype)), ADAMW, mesh).params
            found = find_start(str(name)).params(like)
            assert found.keys() == params.keys()
            for weight, array in found.items():
                assert array.sharding == like[weight].sharding
                np.testing.assert_array_equal(array, (params[weight] * factor).astype(dtype), err_msg=weight)
    assert len(found["q"].addressable_shards) == 8
    assert found["q"].addressable_shards[0].data.size == found["q"].size // 8


def test_a_damaged_start_is_named_before_it_is_used(
    run: Path, theirs: Path, shape: LlamaConfig, tmp_path: Path
) -> None:
    like = abstract_state(shape, ADAMW, make_mesh(MeshConfig())).params
    folder = shutil.copytree(run, tmp_path / "run")
    manifest = folder / "checkpoints" / "4" / "params" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    start = find_start(str(folder))  # all its files are read only when they are needed
    with pytest.raises(UserError, match=r"manifest\.ocdbt has \d+ bytes and had .+ or take another .+ of \[0, 4\]$"):
        start.params(like)
    (folder / "checkpoints" / "4" / "run.json").unlink()
    for name in (folder, folder / "checkpoints" / "4"):
        with pytest.raises(UserError, match=r"4/run\.json is missing; copy it again, or take another checkpoint"):
            find_start(str(name))
    copy = shutil.copytree(theirs, tmp_path / "theirs")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut off"):
        find_start(str(copy)).params(like)


def test_a_checkpoint_of_an_earlier_version_is_called_that(tmp_path: Path) -> None:
    for item in ("params", "optimizer", "run"):  # as they were, without a list of files
        (tmp_path / "checkpoints" / "4" / item).mkdir(parents=True)
    (tmp_path / "checkpoints" / "4" / "_CHECKPOINT_METADATA").touch()
    for name in (tmp_path, tmp_path / "checkpoints" / "4"):
        with pytest.raises(UserError, match="an earlier version of easylm_like wrote it: go on with that one"):
            find_start(str(name))
