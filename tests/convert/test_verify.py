"""A conversion that is not the same model does not succeed: the mistakes that people make here are caught."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easylm_like.convert.open import open_source
from easylm_like.convert.source import Hints
from easylm_like.convert.verify import TOLERANCE, probe_prompts, prove, verify_tokenizer
from easylm_like.data.template import KOALA, PLAIN
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.hf import keys

from .conftest import SHAPES, Export, convert

SHAPE = SHAPES["tied"]  # all its matrices are square: a wrong one has the right shape


def to_hf(export: Export, out: Path) -> None:
    convert("to-hf", export.run, out)


def to_orbax(export: Export, out: Path) -> None:
    convert("to-orbax", export.folder, out)


def to_half(export: Export, out: Path) -> None:
    convert("to-hf", export.run, out, "--dtype=bfloat16")


def prove_equal(one: Path, other: Path, length: int = 128) -> dict[str, dict[str, float]]:
    """Prove that two places hold one model."""
    source, written = open_source(one, Hints()), open_source(other, Hints())
    assert source.tokenizer is not None
    return prove(source, written, source.tensors, probe_prompts(source.tokenizer, KOALA, length))


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
@pytest.mark.parametrize("conversion", [to_hf, to_orbax, to_half])
def test_exchanged_names_are_caught(
    export: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
    conversion: Callable[[Export, Path], None],
) -> None:
    monkeypatch.setattr(keys, "LLAMA_KEYS", swap(first, second))
    with pytest.raises(UserError, match=r"logits differ by .* nothing was written"):
        conversion(export, tmp_path / "out")
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
    export: Export, tmp_path: Path, fields: dict[str, object]
) -> None:
    folder = Path(shutil.copytree(export.folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=r"logits differ by|this library computes|does not agree"):
        prove_equal(export.run, folder)


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
        convert("to-hf", run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def changed(export: Export, place: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """Return a copy of the folder whose weights somebody else changed."""
    folder = Path(shutil.copytree(export.folder, place / "changed"))
    (folder / "files.json").unlink()
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_weights_that_are_no_numbers_are_caught(export: Export, tmp_path: Path) -> None:
    def spoil(weights: dict[str, np.ndarray]) -> None:
        weights["model.norm.weight"][3] = np.nan
        weights["model.layers.1.mlp.up_proj.weight"][2, 5] = np.inf

    folder = changed(export, tmp_path, spoil)
    names = "model.layers.1.mlp.up_proj.weight has values that are no finite numbers; model.norm.weight has values"
    with pytest.raises(UserError) as error:
        convert("to-hf", folder, tmp_path / "out")
    assert all(name in str(error.value) for name in names.split("; "))
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


def test_what_float16_cannot_hold_is_caught(export: Export, tmp_path: Path) -> None:
    def grow(weights: dict[str, np.ndarray]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5

    folder = changed(export, tmp_path, grow)
    with pytest.raises(UserError, match=r"0\.mlp\.up_proj\.weight has values .* take bfloat16"):
        convert("to-hf", folder, tmp_path / "out", "--dtype=float16")


def test_one_bit_of_one_array_is_caught(export: Export, tmp_path: Path) -> None:
    def flip(weights: dict[str, np.ndarray]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"].view(np.uint32)[2, 5] ^= 1

    with pytest.raises(UserError, match=r"1\.mlp\.up_proj\.weight is not what was to be written; nothing"):
        prove_equal(export.run, changed(export, tmp_path, flip))


@pytest.mark.parametrize("without_torch", [False, True])
def test_the_proof_says_what_was_compared(export: Export, monkeypatch: pytest.MonkeyPatch, without_torch: bool) -> None:
    if without_torch:
        monkeypatch.setattr("easylm_like.convert.verify.TORCH_BYTES", 0)
    proof = prove_equal(export.run, export.folder, length=30)
    assert proof["arrays"]["compared"] == proof["arrays"]["equal_to_the_bit"] == len(load_file(weights_of(export)))
    assert ("transformers" in proof) != without_torch
    for name in proof.keys() - {"arrays"}:
        assert proof[name]["positions"] == 60
        assert 0 < proof[name]["share_of_spread"] < TOLERANCE / 10
        assert proof[name]["mean_kl_nats"] < 1e-8
        assert proof[name]["greedy_agreement"] == 1


def weights_of(export: Export) -> Path:
    return export.folder / "model.safetensors"


def test_what_rounding_changes_is_told_beside_the_proof(export: Export, tmp_path: Path) -> None:
    convert("to-hf", export.run, tmp_path / "half", "--dtype=bfloat16")
    proof = json.loads((tmp_path / "half" / "conversion.json").read_text())["proof"]
    assert proof["arrays"]["rounded_before"] == proof["arrays"]["compared"]
    assert proof["logits"]["share_of_spread"] > 10 * TOLERANCE
    assert proof["logits"]["mean_kl_nats"] > 1e-6
    for side in ("logits_as_read", "logits_as_written", "transformers"):
        assert proof[side]["share_of_spread"] < TOLERANCE / 10


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
