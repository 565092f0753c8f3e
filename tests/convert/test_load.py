"""A model is loaded from wherever it is, with the template that it was trained with."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from easylm_like.convert.load import load_model, model_digest
from easylm_like.errors import UserError

from .conftest import SHAPES, Export


@pytest.mark.parametrize("export", SHAPES, indirect=True)
def test_a_run_and_its_folder_are_one_model(export: Export) -> None:
    run, folder = load_model(export.run), load_model(export.folder)
    assert run.config == folder.config == export.shape
    assert run.template.name == folder.template.name == "koala"
    assert run.tokenizer.digest == folder.tokenizer.digest
    assert run.params.keys() == folder.params.keys() == export.params.keys()
    for name, weight in export.params.items():
        np.testing.assert_array_equal(run.params[name], weight)
        np.testing.assert_array_equal(folder.params[name], weight)


def test_a_folder_from_elsewhere_needs_to_be_told_its_template(export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export.folder, tmp_path / "copy"))
    (folder / "conversion.json").unlink()
    with pytest.raises(UserError, match=r"copy: nothing there says which template"):
        load_model(folder)
    assert load_model(folder, "plain").template.name == "plain"
    assert load_model(export.folder, "plain").template.name == "plain"
    with pytest.raises(UserError, match="unknown template 'alpaka'"):
        load_model(folder, "alpaka")


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=rf"{path}: neither a work directory .* nor a Hugging Face folder"):
            load_model(path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint of step any"):
        load_model(tmp_path)


def test_a_digest_changes_with_the_model(export: Export, new_run: Callable[..., Path], tmp_path: Path) -> None:
    assert model_digest(export.run) == model_digest(export.run) != model_digest(export.folder)
    first, second = (new_run(tmp_path / name, SHAPES["tied"], seed) for seed, name in enumerate(("first", "second")))
    assert model_digest(first) != model_digest(second)
    folder = Path(shutil.copytree(export.folder, tmp_path / "copy"))
    assert model_digest(folder) == model_digest(export.folder)
    (folder / "files.json").unlink()
    before = model_digest(folder)
    (folder / "model.safetensors").write_bytes(b"other")
    assert model_digest(folder) != before
