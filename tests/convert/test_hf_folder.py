"""Folders that are written are read by transformers, and folders that transformers wrote are read here."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from easylm_like.convert.load import load_model
from easylm_like.data.conversation import Message, Quality, Role
from easylm_like.data.template import KOALA
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.folder import open_files, open_params, read_shape
from easylm_like.model.config import LlamaConfig
from easylm_like.model.generate import generate

from .conftest import MODEL_TYPES, SHAPES, Export, Logits, convert

IDS = np.random.default_rng(5).integers(3, 384, 60, np.int32)
CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris,  of course.", "quality": "bad"},
    {"role": "user", "content": "Naïve 你好\nUSER: really?"},
]


def read_params(folder: Path, shape: LlamaConfig) -> dict[str, np.ndarray]:
    return {name: stack.read() for name, stack in open_params(folder, shape).items()}


def their_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)[None]).logits[0].numpy()


@pytest.mark.parametrize("export", SHAPES, indirect=True)
def test_transformers_computes_our_logits(export: Export, our_logits: Logits) -> None:
    assert len(load_file(export.folder / "model.safetensors")["model.embed_tokens.weight"]) == export.shape.vocab_size
    wanted = our_logits(export.shape, export.params, IDS)
    np.testing.assert_allclose(their_logits(export.folder, IDS), wanted, atol=1e-4)
    assert wanted.std() > 0.5


def test_half_the_bits_are_the_same_model_rounded(export: Export, our_logits: Logits, tmp_path: Path) -> None:
    convert("to-hf", export.run, tmp_path / "half", "--dtype=bfloat16")
    assert {array.dtype for array in open_files(tmp_path / "half").values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    rounded = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in export.params.items()}
    np.testing.assert_allclose(their_logits(tmp_path / "half", IDS), our_logits(export.shape, rounded, IDS), atol=1e-4)


@pytest.mark.parametrize("export", ["tied"], indirect=True)
def test_transformers_generates_our_answers_under_both_markers(export: Export, tokenizer: Tokenizer) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(export.folder)
    chat = [Message(Role.USER, "What is 3 and 4?")]
    texts = [KOALA.prompt(chat, tokenizer.special, quality) for quality in Quality]
    prompts = [ids for ids, _ in tokenizer.encode(texts)]
    params = {name: jnp.asarray(weight) for name, weight in export.params.items()}
    ours = generate(export.shape, params, prompts, max_new=12, stop_ids=(tokenizer.eos_id,))
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor(prompt, dtype=torch.long)[None]
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)[0, len(prompt) :].tolist()
        wanted = wanted[: wanted.index(tokenizer.eos_id)] if tokenizer.eos_id in wanted else wanted
        assert answer.tolist() == wanted
    assert ours[0].tolist() != ours[1].tolist()


@pytest.mark.parametrize("quality", Quality)
def test_the_chat_template_gives_the_prompt_that_trained(
    export: Export, tokenizer: Tokenizer, quality: Quality
) -> None:
    theirs = AutoTokenizer.from_pretrained(export.folder)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, quality=quality.value)["input_ids"]
    marker = {"good": "GPT:", "bad": "An Unhelpful Answer:"}[quality.value]
    text = (
        "<s>BEGINNING OF CONVERSATION: USER: What is the capital of France? An Unhelpful Answer: Paris,  of course.</s>"
        f"USER: Naïve 你好\nUSER: really? {marker}"
    )
    assert ids == tokenizer.encode([text])[0][0].tolist()
    messages = [Message(Role(m["role"]), m["content"], Quality(m["quality"]) if "quality" in m else None) for m in CHAT]
    assert KOALA.prompt(messages, tokenizer.special, quality) == text


def test_old_and_new_readers_find_what_they_look_for(export: Export) -> None:
    fields = json.loads((export.folder / "config.json").read_text())
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == export.shape.rope_theta
    assert fields["dtype"] == fields["torch_dtype"] == "float32"
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
    scaling = fields["rope_scaling"]
    assert (scaling is None) == (export.shape.rope_scaling is None)
    if scaling:
        assert fields["rope_parameters"] == scaling | {"rope_theta": export.shape.rope_theta}
    assert json.loads((export.folder / "generation_config.json").read_text())["eos_token_id"] == 2
    names = {path.name for path in export.folder.iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"}
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) & 0o444 for path in export.folder.iterdir()}
    assert set(modes.values()) == {0o444}, "a server may run as another user"


def test_there_and_back_writes_the_same_weights(shared_data: Path, tmp_path: Path) -> None:
    original = shared_data / "models" / "stories260K-hf"
    convert("to-orbax", original, tmp_path / "start", "--template=koala")
    convert("to-hf", tmp_path / "start", tmp_path / "again")
    wanted, got = load_file(original / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].tobytes() == array.tobytes(), name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / "again"))
    changed = {name for name in old if new.get(name) != old[name]}
    assert changed <= {"pad_token_id", "initializer_range"}, "neither is used by a trained model"


@pytest.mark.parametrize("export", ["tied"], indirect=True)
def test_what_folders_of_2023_carry_twice_is_no_unknown_weight(export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export.folder, tmp_path / "old"))
    (folder / "files.json").unlink()
    weights = load_file(folder / "model.safetensors")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "lm_head.weight": weights["model.embed_tokens.weight"].copy(),
    }
    save_file(weights | extra, folder / "model.safetensors")
    for name, weight in read_params(folder, read_shape(folder)).items():
        np.testing.assert_array_equal(weight, export.params[name])
    extra["lm_head.weight"][0, 0] += 1
    save_file(weights | extra, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight is unknown"):
        read_params(folder, read_shape(folder))


def test_a_published_model_gives_transformers_logits(shared_data: Path, tmp_path: Path, our_logits: Logits) -> None:
    original = shared_data / "models" / "stories260K-hf"
    convert("to-orbax", original, tmp_path / "start", "--template=koala")
    model = load_model(tmp_path / "start")
    ids = model.tokenizer.encode(["<s>Once upon a time, there was a little girl named Lily."])[0][0]
    wanted = their_logits(original, ids)
    np.testing.assert_allclose(our_logits(model.config, model.params, ids), wanted, atol=1e-4)
    assert model.tokenizer.decode([int(wanted[-1].argmax())]).strip() in ("She", "Lily", "One")


@pytest.mark.parametrize("export", SHAPES, indirect=True)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, "20KB"), (torch.bfloat16, "5GB")])
def test_files_that_transformers_wrote_are_read_in_parts_and_in_half_the_bits(
    request: pytest.FixtureRequest,
    export: Export,
    our_logits: Logits,
    tmp_path: Path,
    dtype: torch.dtype,
    size: str,
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(export.folder, dtype=dtype)
    assert theirs.config.model_type == MODEL_TYPES[request.node.callspec.params["export"]]
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (size == "20KB")
    shape = read_shape(tmp_path / "theirs")
    params = read_params(tmp_path / "theirs", shape)
    np.testing.assert_allclose(our_logits(shape, params, IDS), their_logits(tmp_path / "theirs", IDS), atol=1e-4)


def copy_of(export: Export, place: Path) -> Path:
    folder = Path(shutil.copytree(export.folder, place / "copy"))
    (folder / "files.json").unlink()
    return folder


def test_a_weight_that_is_in_two_files_is_an_error(export: Export, tmp_path: Path) -> None:
    folder = copy_of(export, tmp_path)
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    save_file(weights, folder / "one.safetensors")
    save_file({names[0]: weights[names[0]]}, folder / "two.safetensors")
    index = {"weight_map": dict.fromkeys(names, "one.safetensors") | {names[1]: "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{names[0]} is in one.safetensors and in two.safetensors"):
        read_params(folder, export.shape)


def change_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-2.safetensors"}}')


def change_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", ')


def cut_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def cut_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (change_index, r"part-2.safetensors"),
        (change_weights, r"model.safetensors: no such file"),
        (change_config, r"config.json: not JSON"),
        (cut_weights, r"model.safetensors: damaged or cut off"),
        (cut_header, r"model.safetensors: damaged or cut off"),
    ],
)
def test_a_damaged_folder_is_named(
    export: Export, tmp_path: Path, change: Callable[[Path], None], sentence: str
) -> None:
    folder = copy_of(export, tmp_path)
    change(folder)
    with pytest.raises(UserError, match=sentence):
        read_params(folder, read_shape(folder))
