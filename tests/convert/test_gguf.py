"""GGUF files against gguf-py, transformers and the formulas of llama.cpp's own converter."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Ggml
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from easylm_like.convert.gguf.names import is_scaled_by, scaling_to_factors
from easylm_like.convert.gguf.read import open_gguf
from easylm_like.convert.gguf.write import About, GgufType, parse_type, rounded, write_gguf
from easylm_like.convert.reference import reference_logits
from easylm_like.convert.source import Hints
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.config import shape_to_hf
from easylm_like.hf.keys import their_shapes
from easylm_like.hf.tensors import DTYPES, Tensor, as_tensor
from easylm_like.model.config import LlamaConfig, RopeScaling
from easylm_like.model.presets import get_preset

SMALL = LlamaConfig(
    vocab_size=390, d_model=64, d_ff=96, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, rope_theta=500.0
)
STRETCH = RopeScaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=32)
SHAPES = {
    "llama": SMALL,
    "llama3": dataclasses.replace(SMALL, rope_scaling=STRETCH, tie_embeddings=True, norm_eps=1e-6),
    "mistral": dataclasses.replace(SMALL, sliding_window=9, head_dim=32),
    "qwen2": dataclasses.replace(SMALL, qkv_bias=True, sliding_window=11, rope_theta=1e6),
    "qwen3": dataclasses.replace(SMALL, qk_norm=True, tie_embeddings=True, head_dim=32, d_ff=80),
}


def draw(shape: LlamaConfig, dtype: str = "float32") -> dict[str, Tensor]:
    """Return weights under Hugging Face's names, no two alike."""
    random = np.random.default_rng(0)
    return {
        name: as_tensor((random.normal(0, 0.3, size) + name.endswith("norm.weight")).astype(DTYPES[dtype]))
        for name, size in their_shapes(shape).items()
    }


@pytest.fixture(scope="session")
def written(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the file of a shape of SHAPES; tests must not change it."""
    files: dict[tuple[str, GgufType, str], Path] = {}

    def write(name: str, kind: GgufType = GgufType.F32, dtype: str = "float32") -> Path:
        key = name, kind, dtype
        if key not in files:
            files[key] = tmp_path_factory.mktemp(name) / "m.gguf"
            about = About("small", "{{ messages }}", [5])
            write_gguf(files[key], SHAPES[name], draw(SHAPES[name], dtype), tokenizer, kind=kind, about=about)
        return files[key]

    return write


@pytest.mark.parametrize("kind", GgufType)
def test_every_tensor_comes_back_to_the_bit(kind: GgufType, written: Callable[..., Path]) -> None:
    for name in ("llama", "qwen3"):
        dtype = "bfloat16" if kind == GgufType.BF16 else "float32"
        weights, back = draw(SHAPES[name], dtype), open_gguf(written(name, kind, dtype), Hints())
        assert back.config == SHAPES[name]
        assert back.tensors.keys() == weights.keys()
        for key, tensor in back.tensors.items():
            wanted, got = rounded(key, weights[key], kind), tensor.read()
            assert tensor.shape == wanted.shape == got.shape
            assert tensor.dtype == wanted.dtype == got.dtype
            assert got.tobytes() == wanted.read().tobytes(), key
            error = np.abs(got.astype(np.float32) - weights[key].read().astype(np.float32)).max()
            few_bits = kind.name[:2] in ("Q4", "Q5") and "layers" in key  # embedding and head have eight
            assert error < (0.2 if few_bits else 0.01), key


@pytest.mark.parametrize("name", SHAPES)
def test_the_file_is_what_llama_cpps_converter_would_write(name: str, written: Callable[..., Path]) -> None:
    shape, weights = SHAPES[name], draw(SHAPES[name])
    reader = gguf.GGUFReader(written(name, GgufType.Q8_0))
    told = {key: field.contents() for key, field in reader.fields.items()}
    arch = told["general.architecture"]
    assert arch == {"llama3": "llama", "mistral": "llama"}.get(name, name)
    assert told[f"{arch}.attention.head_count_kv"] == 2
    assert told[f"{arch}.feed_forward_length"] == shape.d_ff
    assert told[f"{arch}.rope.dimension_count"] == told[f"{arch}.attention.key_length"] == shape.head_dim
    assert told[f"{arch}.rope.freq_base"] == shape.rope_theta
    assert told["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert told["tokenizer.chat_template"] == "{{ messages }}"
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], shape.n_layers)
    found = {tensor.name: tensor for tensor in reader.tensors}
    wanted = {names.get_name(key, (".weight", ".bias")): weight.read() for key, weight in weights.items()}
    assert found.keys() - {"rope_freqs.weight"} == wanted.keys()
    for key, weight in wanted.items():
        if arch == "llama" and re.search("attn_[qk].weight", key):  # LlamaModel.permute
            heads = shape.n_heads if "attn_q" in key else shape.n_kv_heads
            weight = weight.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(weight.shape)
        kind = Ggml.F32 if weight.ndim == 1 else Ggml.F16 if weight.shape[1] % 32 else Ggml.Q8_0
        assert found[key].tensor_type == kind, key
        assert found[key].data.tobytes() == gguf.quants.quantize(weight, kind).tobytes(), key


@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_the_files_own_layout_are_those_of_the_weights(name: str, written: Callable[..., Path]) -> None:
    ids = np.random.default_rng(3).integers(0, 390, 40)
    back, weights = open_gguf(written(name), Hints()), draw(SHAPES[name])
    wanted = reference_logits(shape_to_hf(SHAPES[name]), weights, ids)
    np.testing.assert_allclose(back.logits(ids), wanted, atol=2e-4)
    assert np.std(wanted) > 1
    assert back.config == SHAPES[name]
    assert back.chat_template == "{{ messages }}"
    assert back.stop_ids == (5,)


@pytest.mark.parametrize("preset", ["llama31_8b", "llama32_1b", "llama32_3b", "llama33_70b"])
def test_the_published_scalings_are_found_in_the_factors(preset: str) -> None:
    shape = get_preset(preset)
    theirs = transformers.LlamaConfig(**shape_to_hf(shape))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    plain = 1 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    assert is_scaled_by(shape, (plain / scaled).numpy())
    assert not is_scaled_by(dataclasses.replace(shape, rope_scaling=STRETCH), (plain / scaled).numpy())
    assert scaling_to_factors(shape).dtype == np.float32


def test_every_type_that_gguf_py_can_dequantise_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shape = dataclasses.replace(SMALL, d_model=256, d_ff=256, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=64)
    write_gguf(tmp_path / "m.gguf", shape, draw(shape), tokenizer, kind=GgufType.F32, about=About("x"))
    reader, kinds = gguf.GGUFReader(tmp_path / "m.gguf"), [*gguf.quants._type_traits]
    writer, random = gguf.GGUFWriter(tmp_path / "all.gguf", "llama"), np.random.default_rng(0)
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    used = {}
    for tensor in reader.tensors:
        if len(tensor.shape) < 2 or not kinds:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        kind = used[tensor.name] = kinds.pop()
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = random.integers(0, 256, (int(tensor.shape[1]), 256 // block * size), np.uint8)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    assert not kinds
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = open_gguf(tmp_path / "all.gguf", Hints())
    assert back.tokenizer is None
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    raw = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "all.gguf").tensors}
    with np.errstate(all="ignore"):  # bytes at random are scales that are no numbers too
        for key, tensor in back.tensors.items():
            name = names.get_name(key, (".weight",))
            if name in used and not re.search("attn_[qk]", name):
                got, wanted = tensor.read().astype(np.float32), gguf.quants.dequantize(raw[name], used[name])
                np.testing.assert_array_equal(got, wanted, err_msg=used[name].name)


def test_a_split_file_is_read_as_one(written: Callable[..., Path], tmp_path: Path) -> None:
    reader = gguf.GGUFReader(written("llama"))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=8)
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("*.gguf"))
    whole, split = open_gguf(written("llama"), Hints()), open_gguf(parts[0], Hints())
    assert len(parts) > 1
    assert all((tensor.read() == split.tensors[key].read()).all() for key, tensor in whole.tensors.items())
    with pytest.raises(UserError, match="give the first one"):
        open_gguf(parts[1], Hints())
    parts[-1].unlink()
    with pytest.raises(UserError, match=f"{parts[-1].name} must lie beside it"):
        open_gguf(parts[0], Hints())


def test_opening_reads_no_weights(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dataclasses.replace(get_preset("llama31_70b"), vocab_size=400)
    sizes = {name: Tensor(size, DTYPES["float16"], lambda: np.empty(0)) for name, size in their_shapes(shape).items()}
    end = {}

    def stop(writer: gguf.GGUFWriter, data: np.ndarray) -> None:
        end["bytes"] = sum(tensor.nbytes + 31 for tensor in writer.tensors[0].values())
        raise InterruptedError

    plain = dataclasses.replace(shape, rope_scaling=None)
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", stop)
        with pytest.raises(InterruptedError):
            write_gguf(tmp_path / "m.gguf", plain, sizes, tokenizer, kind=GgufType.F16, about=About("x"))
    os.truncate(tmp_path / "m.gguf", (tmp_path / "m.gguf").stat().st_size + end["bytes"])  # 130 GB of nothing
    assert open_gguf(tmp_path / "m.gguf", Hints()).tensors["lm_head.weight"].shape == (400, 8192)
    assert open_gguf(tmp_path / "m.gguf", Hints(shape="llama31_70b")).config == shape


def rewritten(path: Path, out: Path, values: dict[str, object], tensors: Callable[[str], str | None]) -> Path:
    """Return a copy of a file with other metadata, and tensors under other names or left out."""
    reader = gguf.GGUFReader(path)
    told = {key: field.contents() for key, field in reader.fields.items()}
    writer = gguf.GGUFWriter(out, str(values.get("general.architecture", told["general.architecture"])))
    for key, field in reader.fields.items():
        if key.startswith("llama.") and values.get(key, 0) is not None:
            writer.add_key_value(key, values.get(key, field.contents()), field.types[0])
    for key in values.keys() - told.keys():
        value = values[key]
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, int(str(value)))
    for tensor in reader.tensors:
        if (name := tensors(tensor.name)) is not None:
            writer.add_tensor(name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "experts": ({"llama.expert_count": 8}, "not computed here: llama.expert_count = 8"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "not computed here: llama.rope.scaling.type = 'yarn'"),
    "no size": ({"llama.block_count": None}, "lacks llama.block_count"),
    "half a head turned": ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8; here it must be .* 16"),
    "another one": ({"general.architecture": "gemma3"}, "'gemma3'; this library computes llama, qwen2, qwen3"),
    "other sizes": ({"llama.feed_forward_length": 97}, r"blk.1.ffn_up.weight is \(96, 64\) instead of \(97, 64\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_computed_is_told(name: str, written: Callable[..., Path], tmp_path: Path) -> None:
    values, sentence = WRONG[name]
    with pytest.raises(UserError, match=sentence):
        open_gguf(rewritten(written("llama"), tmp_path / "m.gguf", values, lambda name: name), Hints())


def test_all_wrong_tensors_are_listed(written: Callable[..., Path], tmp_path: Path) -> None:
    names = {"blk.0.attn_q.weight": None, "blk.1.attn_v.weight": "blk.1.attn_w.weight"}
    path = rewritten(written("llama"), tmp_path / "m.gguf", {}, lambda name: names.get(name, name))
    with pytest.raises(UserError) as told:
        open_gguf(path, Hints())
    for problem in ("attn_q.weight is missing", "blk.1.attn_v.weight is missing", "blk.1.attn_w.weight is unknown"):
        assert problem in str(told.value)


def test_a_damaged_file_is_told_from_a_whole_one(written: Callable[..., Path], tmp_path: Path) -> None:
    content, path = written("llama").read_bytes(), tmp_path / "m.gguf"
    for length in (9, 30, 200, 5000, len(content) - 40):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="is cut off"):
            open_gguf(path, Hints())
    for start, sentence in {b"PK\3\4": "not a GGUF", b"": "not a GGUF", b"GGUF\0\0\0\3": "big-endian"}.items():
        path.write_bytes(start + content[8:] if start else b"")
        with pytest.raises(UserError, match=sentence):
            open_gguf(path, Hints())
    place = content.index(b"token_embd.weight") + 17 + 4 + 16
    path.write_bytes(content[:place] + b"\x77" + content[place + 1 :])
    with pytest.raises(UserError, match=r"token_embd.weight is of ggml type 119"):
        open_gguf(path, Hints())
    path.write_bytes(content)
    back = open_gguf(path, Hints())
    os.truncate(path, 10_000)
    with pytest.raises(UserError, match="has become shorter"):
        back.tensors["lm_head.weight"].read()


def test_a_type_that_cannot_be_written_is_told() -> None:
    assert parse_type("Q8_0") == GgufType.Q8_0
    with pytest.raises(UserError, match=r"'Q4_K_M'; known are f32, .*llama-quantize"):
        parse_type("Q4_K_M")
