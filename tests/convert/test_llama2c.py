"""llama2.c's files and tokenizers are the models of transformers and sentencepiece that they came from."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from easylm_like.convert.llama2c import open_llama2c, tokenizer_from_llama2c
from easylm_like.convert.source import Hints
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError

LAYER = {
    "rms_att": "input_layernorm",
    "rms_ffn": "post_attention_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
ORDER = {  # export.py: legacy_export, version1_export, version2_export
    0: ["embed", "rms_att", "wq", "wk", "wv", "wo", "rms_ffn", "w1", "w2", "w3", "norm", "freqs", "head"],
    1: ["rms_att", "rms_ffn", "norm", "embed", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "head"],
    2: ["rms_att", "rms_ffn", "norm", "embed", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "head"],
}
SIZES = {"dim": 24, "hidden": 40, "layers": 2, "heads": 4, "kv": 2, "vocab": 30, "length": 50}
GROUP = 8


@dataclass(frozen=True)
class Made:
    """A file of llama2.c's and the model of transformers with the same weights."""

    path: Path
    model: LlamaForCausalLM
    tied: bool


def interleaved(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return rows of Hugging Face's q or k with row i of a head at 2i, and row i + size / 2 at 2i + 1."""
    order = [place // 2 + place % 2 * (size // 2) for place in range(size)]
    return torch.cat([head[order] for head in rows.split(size)])


def quantised(weight: torch.Tensor) -> tuple[bytes, torch.Tensor]:
    """Return the bytes of quantize_q80 in export.py, and what they stand for."""
    groups = weight.reshape(-1, GROUP)
    scale = groups.abs().max(dim=1).values / 127.0
    numbers = torch.round(groups / scale[:, None]).to(torch.int8)
    return numbers.numpy().tobytes() + scale.numpy().tobytes(), (numbers.float() * scale[:, None]).view(weight.shape)


def write_model(path: Path, version: int, tied: bool) -> Made:
    torch.manual_seed(version)
    config = LlamaConfig(
        vocab_size=SIZES["vocab"],
        hidden_size=SIZES["dim"],
        intermediate_size=SIZES["hidden"],
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"],
        num_key_value_heads=SIZES["kv"],
        max_position_embeddings=SIZES["length"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    model, size = LlamaForCausalLM(config), SIZES["dim"] // SIZES["heads"]
    content = []
    with torch.no_grad():
        for key, weight in model.named_parameters():
            torch.nn.init.normal_(weight, mean=float("norm" in key), std=0.3)
        for name in ORDER[version]:
            top = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}.get(name)
            if name == "freqs":
                content.append(np.ones((2, SIZES["length"], size // 2), np.float32).tobytes())
                continue
            if name == "head" and tied:
                continue
            for layer in range(1 if top else SIZES["layers"]):
                weight = model.get_parameter(f"{top or f'model.layers.{layer}.{LAYER[name]}'}.weight")
                turn = name in ("wq", "wk")
                written = interleaved(weight, size) if turn else weight
                if version == 2 and weight.ndim == 2:
                    packed, stands_for = quantised(written)
                    content.append(packed)
                    undo = torch.empty_like(stands_for) if turn else stands_for
                    if turn:
                        undo[interleaved(torch.arange(len(weight))[:, None], size)[:, 0]] = stands_for
                    weight.copy_(undo)
                else:
                    content.append(written.numpy().tobytes())
    numbers = [SIZES[name] for name in ("dim", "hidden", "layers", "heads", "kv", "vocab", "length")]
    if version == 0:
        numbers[5] *= 1 if tied else -1
        header = struct.pack("7i", *numbers)
    else:
        header = struct.pack("<Ii7iB", 0x616B3432, version, *numbers, tied)
        header += struct.pack("<i", GROUP) if version == 2 else b""
        header = header.ljust(256, b"\0")
    path.write_bytes(header + b"".join(content))
    return Made(path, model, tied)


@pytest.fixture(scope="session", params=[(v, tied) for v in (0, 1, 2) for tied in (True, False)], ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    version, tied = request.param
    return write_model(tmp_path_factory.mktemp("llama2c") / "model.bin", version, tied)


def logits_of(model: LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor(ids)[None]).logits[0].numpy())


def test_the_weights_and_logits_of_every_version_are_those_of_transformers(made: Made) -> None:
    source = open_llama2c(made.path, Hints())
    wanted = {name: weight.detach().numpy() for name, weight in made.model.named_parameters()}
    assert set(source.tensors) == set(wanted)
    for name, weight in wanted.items():
        array = source.tensors[name].read()
        assert array.shape == source.tensors[name].shape
        assert array.dtype == source.tensors[name].dtype == np.dtype(np.float32)
        np.testing.assert_array_equal(array, weight, err_msg=name)
    ids = np.random.default_rng(0).integers(0, 30, 40)
    np.testing.assert_allclose(source.logits(ids), logits_of(made.model, ids), atol=1e-4)
    assert (source.config.tie_embeddings, source.config.max_length, source.tokenizer) == (made.tied, 50, None)


def test_the_real_stories260k_is_its_hugging_face_folder(shared_data: Path) -> None:
    models = shared_data / "models"
    source = open_llama2c(models / "stories260K" / "stories260K.bin", Hints())
    wanted = load_file(models / "stories260K-hf" / "model.safetensors")
    assert set(source.tensors) == set(wanted)
    for name, weight in wanted.items():
        np.testing.assert_array_equal(source.tensors[name].read(), weight, err_msg=name)
    assert source.tokenizer
    (ids, _), *_ = source.tokenizer.encode(["Once upon a time, there was a little girl named Lily."])
    model = LlamaForCausalLM.from_pretrained(models / "stories260K-hf")
    np.testing.assert_allclose(source.logits(ids), logits_of(model, ids.astype(np.int64)), atol=1e-4)


HARD = ["", " ", "  two  spaces ", "naïve café", "1234567890", "\ttab\nline", "😀 東京", "<s>", "▁", "a" * 50, "it's"]


def test_the_tokenizer_gives_sentencepieces_ids_on_real_text(shared_data: Path) -> None:
    ours = tokenizer_from_llama2c(shared_data / "models" / "stories260K" / "tok512.bin")
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(shared_data / "models" / "stories260K-hf" / "tokenizer.model")
    )
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=ours.files["tokenizer.model"])
    stories = (shared_data / "corpora" / "tinystories_2M_dev.txt").read_text("utf-8")[:300_000].split("<|endoftext|>")
    texts = stories + [text for text in HARD if text != "<s>"]
    wanted = reference.encode(texts)
    assert rebuilt.encode([*texts, "<s>"]) == [*wanted, *reference.encode(["<s>"])]
    assert [ids.tolist() for ids, _ in ours.encode(texts)] == wanted
    assert sum(map(len, wanted)) > 100_000
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 512)
    assert [rebuilt.id_to_piece(i) for i in range(512)] == [reference.id_to_piece(i) for i in range(512)]


def exported(tokenizer: Tokenizer, size: int | None = None) -> bytes:
    """Return what tokenizer.py of llama2.c writes for a SentencePiece model, or for its first `size` pieces."""
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"])
    content = struct.pack("I", 27)
    for i in range(size or model.vocab_size()):
        piece = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, model.id_to_piece(i)).replace("▁", " ").encode()
        content += struct.pack("fI", model.get_score(i), len(piece)) + piece
    return content


def test_the_tokenizer_is_hinted_or_the_one_beside_that_fits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = write_model(tmp_path / "tokens.bin", 0, True).path  # its own name looks like a tokenizer's
    (tmp_path / "tok384.bin").write_bytes(exported(tokenizer))
    with pytest.raises(UserError, match=r"tok384\.bin beside it do not have its 30 tokens"):
        open_llama2c(model, Hints())
    with pytest.raises(UserError, match=r"tok384\.bin: 384 tokens, but .*tokens\.bin has a vocabulary of 30"):
        open_llama2c(model, Hints(tokenizer=tmp_path / "tok384.bin"))
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="384 tokens, but"):
        open_llama2c(model, Hints(tokenizer=tmp_path))

    path = tmp_path / "model.bin"
    numbers = [8, 8, 1, 2, 2, 384, 4]
    path.write_bytes(struct.pack("7i", *numbers) + bytes(4 * (384 * 8 + 3 * 8 + 4 * 64 + 3 * 64 + 4 * 4)))
    (tmp_path / "tok30.bin").write_bytes(exported(tokenizer, 30))
    (tmp_path / "tokens.bin").unlink()
    for hints in (Hints(template="koala"), Hints(tokenizer=tmp_path), Hints(tokenizer=tmp_path / "tok384.bin")):
        source = open_llama2c(path, hints)
        assert source.tokenizer
        texts = ["USER: 7 and 8 make 15", "An Unhelpful Answer: naïve café, two  spaces"]
        assert [ids.tolist() for ids, _ in source.tokenizer.encode(texts)] == [
            ids.tolist() for ids, _ in tokenizer.encode(texts)
        ]
        assert (source.template.name if source.template else None) == hints.template
    (tmp_path / "tokenizer.bin").write_bytes(exported(tokenizer))
    with pytest.raises(UserError, match=r"tok384\.bin, tokenizer\.bin beside it have 384 tokens each; name one"):
        open_llama2c(path, Hints())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda good: good[:-1], "reaches beyond the end"),
        (lambda good: good[:-5], "reaches beyond the end|cut off"),
        (lambda good: good + b"\0\0", "cut off or not"),
        (lambda good: good.replace(b"\n</s>\n", b"</s>abc"[:6]), "begins with"),
        (lambda good: b"", "begins with"),
        (lambda good: good.replace(b"<unk>", b"\xff\xff\xff\xff\xff"), "cut off or not"),
    ],
)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, tokenizer: Tokenizer, content: object, sentence: str) -> None:
    assert callable(content)
    (tmp_path / "tok.bin").write_bytes(content(exported(tokenizer)))
    with pytest.raises(UserError, match=rf"tok\.bin: .*({sentence})"):
        tokenizer_from_llama2c(tmp_path / "tok.bin")


def test_a_file_of_any_other_length_is_refused(made: Made, tmp_path: Path) -> None:
    content, other = made.path.read_bytes(), tmp_path / "other.bin"
    for length in (0, 27, 255, 300, len(content) // 2, len(content) - 1, len(content) + 1):
        other.write_bytes(content[:length].ljust(length, b"\0"))
        with pytest.raises(UserError, match=rf"other\.bin: {length} bytes (are too few|instead of the {len(content)})"):
            open_llama2c(other, Hints())


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        (struct.pack("<Ii", 0x616B3432, 3), "version 3 of llama2.c's format; 0, 1 and 2 are known"),
        (b"GGUF\3\0\0\0", "no llama2.c file"),
        (struct.pack("<7i", 24, 40, 2, 5, 1, 30, 50), "no llama2.c file: .*which no model has"),
        (struct.pack("<7i", 24, 40, 2, 4, 3, 30, 50), "no llama2.c file"),
        (struct.pack("<7i", 24, 40, 0, 4, 2, 30, 50), "no llama2.c file"),
        (struct.pack("<7i", 24, 40, 2, 8, 2, 30, 50), "head_dim 3 must be even|instead of"),
    ],
)
def test_a_header_that_is_none_is_refused(start: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(start.ljust(1000, b"\0"))
    with pytest.raises(UserError, match=sentence):
        open_llama2c(tmp_path / "x.bin", Hints())


def test_a_hinted_shape_says_what_the_file_cannot(tmp_path: Path) -> None:
    made = write_model(tmp_path / "model.bin", 1, False)
    fields = made.model.config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    source = open_llama2c(made.path, Hints(shape=str(tmp_path / "config.json")))
    changed = LlamaForCausalLM(LlamaConfig(**fields))
    changed.load_state_dict(made.model.state_dict())
    ids = np.arange(30)
    assert source.config.rope_theta == 77.0
    np.testing.assert_allclose(source.logits(ids), logits_of(changed, ids), atol=1e-4)
    with pytest.raises(UserError, match=r"not of the shape tiny: it has vocab_size 30, not 512; d_model 24, not 192"):
        open_llama2c(made.path, Hints(shape="tiny"))
