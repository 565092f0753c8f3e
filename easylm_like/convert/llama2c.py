"""llama2.c's files: a header, then the arrays one after the other.

The formats are those of karpathy/llama2.c: export.py (legacy_export: version 0, no magic number; version1_export: fp32;
version2_export: Q8_0, int8 in groups with a scale each) and tokenizer.py (tokenizer.bin). run.c computes with a RoPE of
theta 10000 and an eps of 1e-5, whatever the model; no file says either.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from easylm_like.convert.pieces import Piece, build_sentencepiece
from easylm_like.convert.reference import Layout, reference_logits
from easylm_like.convert.rope_rows import to_halves
from easylm_like.convert.shape import read_hinted_shape
from easylm_like.convert.source import Hints, Source
from easylm_like.data.template import get_template
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_sentencepiece
from easylm_like.errors import UserError
from easylm_like.hf.config import shape_to_hf
from easylm_like.hf.tensors import Tensor, Tensors, read_at
from easylm_like.model.config import LlamaConfig

MAGIC = 0x616B3432  # "ak42"
HEADER = 256  # bytes, from version 1 on
_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class _Header:
    """What a file says about itself; `group` is 0 where nothing is quantised."""

    version: int
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    length: int
    tied: bool
    group: int = 0

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True, slots=True)
class _Key:
    """One weight: run.c's name, Hugging Face's; both with {} for the layer."""

    native: str
    theirs: str
    turned: bool = False  # RoPE turns its rows, which are interleaved


KEYS = (
    _Key("token_embedding_table", "model.embed_tokens.weight"),
    _Key("rms_att_weight.{}", "model.layers.{}.input_layernorm.weight"),
    _Key("wq.{}", "model.layers.{}.self_attn.q_proj.weight", turned=True),
    _Key("wk.{}", "model.layers.{}.self_attn.k_proj.weight", turned=True),
    _Key("wv.{}", "model.layers.{}.self_attn.v_proj.weight"),
    _Key("wo.{}", "model.layers.{}.self_attn.o_proj.weight"),
    _Key("rms_ffn_weight.{}", "model.layers.{}.post_attention_layernorm.weight"),
    _Key("w1.{}", "model.layers.{}.mlp.gate_proj.weight"),
    _Key("w2.{}", "model.layers.{}.mlp.down_proj.weight"),
    _Key("w3.{}", "model.layers.{}.mlp.up_proj.weight"),
    _Key("rms_final_weight", "model.norm.weight"),
    _Key("wcls", "lm_head.weight"),
)
LAYOUT = Layout(
    embed="token_embedding_table",
    head="wcls",
    final_norm="rms_final_weight",
    attention_norm="rms_att_weight.{}",
    q="wq.{}",
    k="wk.{}",
    v="wv.{}",
    o="wo.{}",
    mlp_norm="rms_ffn_weight.{}",
    gate="w1.{}",
    up="w3.{}",
    down="w2.{}",
    interleaved=True,
)
_MATRICES = ("wq.{}", "wk.{}", "wv.{}", "wo.{}")
_FEED_FORWARD = ("w1.{}", "w2.{}", "w3.{}")
_ENDS = ("rms_final_weight", "freq_cis_real", "freq_cis_imag", "wcls")  # run.c skips the two that hold RoPE's turns
_EMBED, _NORMS = "token_embedding_table", ("rms_att_weight.{}", "rms_ffn_weight.{}")
# The order of the arrays in each version; a name with {} stands for those of all layers.
_NEWER = (*_NORMS, "rms_final_weight", _EMBED, *_MATRICES, *_FEED_FORWARD, "wcls")
_ORDER = {0: (_EMBED, _NORMS[0], *_MATRICES, _NORMS[1], *_FEED_FORWARD, *_ENDS), 1: _NEWER, 2: _NEWER}


def open_llama2c(path: Path, hints: Hints) -> Source:
    """Return the model in a llama2.c file, with the tokenizer that is hinted or lies beside it.

    Raises:
        UserError: it is of another format or length than its header says, or the tokenizer is not this model's.
    """
    header = _read_header(path)
    native = _open_arrays(path, header)
    config = _config(path, header, hints)
    return Source(
        path=path,
        format="llama2.c file",
        config=config,
        tensors=_to_theirs(native, header),
        logits=partial(reference_logits, shape_to_hf(config), native, layout=LAYOUT),
        tokenizer=_tokenizer(path, header.vocab, hints),
        template=get_template(hints.template) if hints.template else None,
        origin={"path": str(path), "version": header.version, "quantised": bool(header.group)},
    )


def tokenizer_from_llama2c(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.bin, its SentencePiece model rebuilt.

    The file has an int32, the longest token's bytes, then each token's score (fp32), length (int32) and bytes.

    Raises:
        UserError: it is cut off, or its first tokens are not those of LLaMA's tokenizers.
    """
    pieces = [("<unk>", 0.0, Piece.UNKNOWN), ("<s>", 0.0, Piece.CONTROL), ("</s>", 0.0, Piece.CONTROL)]
    for text, score in _read_tokens(path)[len(pieces) :]:
        byte = re.fullmatch("<0x[0-9A-F]{2}>", text)
        pieces.append((text.replace(" ", "▁"), score, Piece.BYTE if byte else Piece.NORMAL))
    return tokenizer_from_sentencepiece(build_sentencepiece(pieces), str(path))


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        start = file.read(HEADER)
    if len(start) < HEADER:
        raise UserError(f"{path}: {len(start)} bytes are too few for a llama2.c file")
    magic, version = struct.unpack_from("<Ii", start)
    if magic != MAGIC:
        version = 0
    elif version not in (1, 2):
        raise UserError(f"{path}: version {version} of llama2.c's format; 0, 1 and 2 are known")
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", start, 8 if version else 0)
    tied = start[36] != 0 if version else vocab > 0
    group = struct.unpack_from("<i", start, 37)[0] if version == 2 else 0
    vocab = vocab if version else abs(vocab)
    header = _Header(version, dim, hidden, layers, heads, kv_heads, vocab, length, tied, group)
    counts = (header.dim, header.hidden, header.layers, header.heads, header.kv_heads, header.vocab, header.length)
    if min(counts) < 1 or header.dim % header.heads or header.heads % header.kv_heads or header.group < 0:
        raise UserError(f"{path}: no llama2.c file: its first numbers would be sizes {counts}, which no model has")
    return header


def _config(path: Path, header: _Header, hints: Hints) -> LlamaConfig:
    """Return the shape; `hints.shape` may say what no file does, such as another RoPE."""
    config = LlamaConfig(
        vocab_size=header.vocab,
        d_model=header.dim,
        d_ff=header.hidden,
        n_layers=header.layers,
        n_heads=header.heads,
        n_kv_heads=header.kv_heads,
        head_dim=header.head_dim,
        tie_embeddings=header.tied,
        max_length=header.length,
    )
    config.check()
    if not hints.shape:
        return config
    hinted = read_hinted_shape(hints.shape)
    told = {"rope_theta", "rope_scaling", "norm_eps", "max_length", "sliding_window"}
    others = [field.name for field in fields(config) if field.name not in told]
    if wrong := [name for name in others if getattr(hinted, name) != getattr(config, name)]:
        both = "; ".join(f"{name} {getattr(config, name)}, not {getattr(hinted, name)}" for name in wrong)
        raise UserError(f"{path}: not of the shape {hints.shape}: it has {both}")
    return hinted


def _shapes(header: _Header) -> Mapping[str, tuple[int, ...]]:
    dim, kv = header.dim, header.kv_heads * header.head_dim
    turns = (header.length, header.head_dim // 2)
    return {
        "token_embedding_table": (header.vocab, dim),
        "rms_att_weight.{}": (dim,),
        "wq.{}": (dim, dim),
        "wk.{}": (kv, dim),
        "wv.{}": (kv, dim),
        "wo.{}": (dim, dim),
        "rms_ffn_weight.{}": (dim,),
        "w1.{}": (header.hidden, dim),
        "w2.{}": (dim, header.hidden),
        "w3.{}": (header.hidden, dim),
        "rms_final_weight": (dim,),
        "freq_cis_real": turns,
        "freq_cis_imag": turns,
        "wcls": (header.vocab, dim),
    }


def _open_arrays(path: Path, header: _Header) -> dict[str, Tensor]:
    """Return every array by run.c's name; a UserError if the file is not as long as all of them together."""
    shapes, arrays = _shapes(header), {}
    place = HEADER if header.version else 28
    for name in _ORDER[header.version]:
        if name == "wcls" and header.tied:
            continue
        shape = shapes[name]
        packed = header.group > 0 and len(shape) == 2
        if packed and prod(shape) % header.group:
            raise UserError(f"{path}: {name} {shape} does not divide into groups of {header.group}; it is damaged")
        size = prod(shape) + prod(shape) // header.group * 4 if packed else prod(shape) * 4
        for layer in range(header.layers if "{}" in name else 1):
            read = partial(_dequantise, path, place, shape, header.group) if packed else None
            arrays[name.format(layer)] = Tensor(shape, _FLOAT, read or partial(read_at, path, place, shape, _FLOAT))
            place += size
    if place != path.stat().st_size:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes instead of the {place} that this header of version {header.version} "
            "asks for; it is cut off, or no llama2.c file"
        )
    return arrays


def _dequantise(path: Path, place: int, shape: tuple[int, ...], group: int) -> np.ndarray:
    numbers = read_at(path, place, (prod(shape) // group, group), np.dtype(np.int8))
    scales = read_at(path, place + numbers.size, (len(numbers), 1), _FLOAT)
    return (numbers * scales).reshape(shape)


def _to_theirs(native: Tensors, header: _Header) -> dict[str, Tensor]:
    tensors = {}
    for key in KEYS:
        for layer in range(header.layers if "{}" in key.native else 1):
            if (name := key.native.format(layer)) in native:
                change = partial(to_halves, head_dim=header.head_dim)
                tensors[key.theirs.format(layer)] = native[name].then(change) if key.turned else native[name]
    return tensors


def _tokenizer(path: Path, vocab: int, hints: Hints) -> Tokenizer | None:
    """Return the hinted tokenizer, or the only tok*.bin beside the model that has its vocabulary."""
    if hints.tokenizer is not None:
        packed = hints.tokenizer.is_file() and hints.tokenizer.suffix == ".bin"
        tokenizer = tokenizer_from_llama2c(hints.tokenizer) if packed else load_tokenizer(hints.tokenizer)
        if tokenizer.vocab_size > vocab:
            raise UserError(f"{hints.tokenizer}: {tokenizer.vocab_size} tokens, but {path} has a vocabulary of {vocab}")
        return tokenizer
    beside = [other for other in sorted(path.absolute().parent.glob("tok*.bin")) if other.name != path.name]
    fitting = [other for other in beside if len(_read_tokens(other)) == vocab]
    if len(fitting) > 1:
        names = ", ".join(other.name for other in fitting)
        raise UserError(f"{path}: {names} beside it have {vocab} tokens each; name one as --tokenizer=FILE")
    if beside and not fitting:
        names = ", ".join(other.name for other in beside)
        raise UserError(f"{path}: {names} beside it do not have its {vocab} tokens; name one as --tokenizer=FILE")
    return tokenizer_from_llama2c(fitting[0]) if fitting else None


def _read_tokens(path: Path) -> list[tuple[str, float]]:
    """Return text and score of every token."""
    content, place, tokens = path.read_bytes(), 4, []
    try:
        while place < len(content):
            score, length = struct.unpack_from("<fi", content, place)
            text = content[place + 8 : place + 8 + length]
            if length < 0 or len(text) != length:
                raise ValueError("a token reaches beyond the end")
            tokens.append((text.decode(), score))
            place += 8 + length
    except (struct.error, ValueError) as error:
        raise UserError(f"{path}: cut off or not llama2.c's tokenizer.bin ({error})") from error
    begins = [text for text, _ in tokens[:3]]
    if begins != ["<unk>", "\n<s>\n", "\n</s>\n"]:
        raise UserError(f"{path}: not llama2.c's tokenizer.bin: begins with {begins} instead of <unk>, <s>, </s>")
    return tokens
