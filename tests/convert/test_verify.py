"""A conversion that is not the same model does not succeed: the mistakes that people make here are caught."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from easylm_like.convert.__main__ import convert_from_hf, convert_to_hf
from easylm_like.convert.verify import probe_prompts, verify_logits, verify_tokenizer
from easylm_like.data.template import KOALA, PLAIN
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.hf import keys

from .conftest import SHAPES, Export

SHAPE = SHAPES["tied"]  # all its matrices are square: a wrong one has the right shape


def to_hf(export: Export, out: Path) -> None:
    convert_to_hf(export.run, out, None, "float32")


def from_hf(export: Export, out: Path) -> None:
    convert_from_hf(export.folder, out, "koala")


def swap(first: str, second: str) -> tuple[keys.Key, ...]:
    """Return the table with the names of two weights exchanged."""
    theirs = {key.ours: key.theirs for key in keys.LLAMA_KEYS}
    theirs[first], theirs[second] = theirs[second], theirs[first]
    return tuple(dataclasses.replace(key, theirs=theirs[key.ours]) for key in keys.LLAMA_KEYS)


@pytest.mark.parametrize(
    ("export", "first", "second"),
    [
        ("tied", "gate", "up"),
        ("tied", "q", "k"),
        ("tied", "v", "o"),
        ("tied", "attention_norm", "mlp_norm"),
        ("qwen2", "k_bias", "v_bias"),
        ("qwen3", "q_norm", "k_norm"),
    ],
    indirect=["export"],
)
@pytest.mark.parametrize("convert", [to_hf, from_hf])
def test_exchanged_names_are_caught(
    export: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
    convert: Callable[[Export, Path], None],
) -> None:
    monkeypatch.setattr(keys, "LLAMA_KEYS", swap(first, second))
    with pytest.raises(UserError, match=r"logits differ by .* nothing was written"):
        convert(export, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("export", "fields"),
    [
        ("mistral", {"sliding_window": 10}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"model_type": "llama"}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen3", {"rms_norm_eps": 0.1}),
    ],
    indirect=["export"],
)
def test_a_config_that_says_another_computation_is_caught(
    export: Export, tokenizer: Tokenizer, tmp_path: Path, fields: dict[str, object]
) -> None:
    folder = Path(shutil.copytree(export.folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match="logits differ by"):
        verify_logits(export.shape, export.params, folder, probe_prompts(tokenizer, KOALA, 128))


def untransposed(ours: np.ndarray, inputs: int | None) -> np.ndarray:
    return ours if inputs is None else ours.reshape(SHAPE.d_model, -1)


def interleaved(ours: np.ndarray, inputs: int | None) -> np.ndarray:
    """Write queries and keys as Meta's files have them, RoPE's pairs side by side."""
    if ours.ndim == 3 and inputs == 1:
        ours = np.stack(np.split(ours, 2, axis=-1), axis=-1).reshape(ours.shape)
    return KEEP(ours, inputs)


KEEP = keys._to_matrix


@pytest.mark.parametrize("layout", [untransposed, interleaved])
def test_a_wrong_layout_is_caught(
    new_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Callable[..., np.ndarray]
) -> None:
    run = new_run(tmp_path / "run", SHAPE)
    monkeypatch.setattr(keys, "_to_matrix", layout)
    with pytest.raises(UserError, match="logits differ by"):
        convert_to_hf(run, tmp_path / "out", None, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_that_are_no_numbers_are_caught(export: Export, tokenizer: Tokenizer) -> None:
    broken = export.params | {"final_norm": np.full_like(export.params["final_norm"], np.nan)}
    with pytest.raises(UserError, match="logits differ by nan"):
        verify_logits(export.shape, broken, export.folder, probe_prompts(tokenizer, KOALA, 128))


def test_the_proof_says_what_was_compared(export: Export, tokenizer: Tokenizer) -> None:
    prompts = probe_prompts(tokenizer, KOALA, 30)
    assert [len(ids) for ids in prompts] == [30, 30]
    proof = verify_logits(export.shape, export.params, export.folder, prompts)
    assert proof.positions == 60
    assert 0 < proof.largest < 1e-4


END = '"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":'


def replace_in(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    "change",
    [
        replace_in("chat_template.jinja", '"GPT:"', '"GPT: "'),
        replace_in("chat_template.jinja", "quality == 'bad'", "quality == 'good'"),
        replace_in("chat_template.jinja", "+ eos_token }}", "}}"),
        replace_in("tokenizer.json", '{"type":"Prepend","prepend":"▁"},', ""),
        replace_in("tokenizer.json", f"{END}false", f"{END}true"),
    ],
    ids=["a-space-after-the-marker", "markers-exchanged", "no-end", "no-dummy-space", "end-is-split"],
)
def test_a_tokenizer_that_transformers_reads_otherwise_is_caught(
    export: Export, tokenizer: Tokenizer, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(export.folder, tmp_path / "copy"))
    verify_tokenizer(folder, tokenizer, KOALA)
    change(folder)
    with pytest.raises(UserError, match=r"copy: transformers reads .* training used"):
        verify_tokenizer(folder, tokenizer, KOALA)


def test_a_document_template_is_proven_too(export: Export, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export.folder, tmp_path / "copy"))
    (folder / "chat_template.jinja").write_text(PLAIN.jinja())
    verify_tokenizer(folder, tokenizer, PLAIN)
    (folder / "chat_template.jinja").write_text(PLAIN.jinja().replace("{{ bos_token }}", ""))
    with pytest.raises(UserError, match="transformers reads"):
        verify_tokenizer(folder, tokenizer, PLAIN)
