"""Write a model as a GGUF file for llama.cpp, one tensor in memory at a time, tokenizer and chat template inside.

What a file holds, and which weights stay float32, follows llama.cpp's convert_hf_to_gguf.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from easylm_like.convert.gguf.blocks import FLOATS, pack, unpack
from easylm_like.convert.gguf.names import (
    ROPE_FACTORS,
    gguf_name,
    scaling_to_factors,
    shape_to_metadata,
    turns_rows,
)
from easylm_like.convert.gguf.vocabulary import tokenizer_to_metadata
from easylm_like.convert.rope_rows import to_pairs
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.keys import their_shapes
from easylm_like.hf.tensors import Tensor, Tensors, as_tensor
from easylm_like.model.config import LlamaConfig

if TYPE_CHECKING:
    import gguf

BLOCK = 32  # weights that share a scale, in all types below
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


class GgufType(StrEnum):
    """How most weights of a file are stored: what gguf-py can write."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q5_1 = "q5_1"
    Q5_0 = "q5_0"
    Q4_1 = "q4_1"
    Q4_0 = "q4_0"


@dataclass(frozen=True, slots=True)
class About:
    """What a file says beside shape, weights and tokenizer; `stop_ids` end an answer beside EOS, at most two."""

    name: str
    chat_template: str | None = None
    stop_ids: Sequence[int] = ()


def parse_type(name: str) -> GgufType:
    """Return the type called `name`, in any case; a UserError lists the known ones."""
    try:
        return GgufType(name.lower())
    except ValueError:
        raise UserError(
            f"unknown GGUF type {name!r}; known are {', '.join(GgufType)}. For others (Q4_K_M ...) write f16 and "
            "give it to llama.cpp's llama-quantize: gguf-py can read them and not write them"
        ) from None


def write_gguf(
    path: Path, config: LlamaConfig, tensors: Tensors, tokenizer: Tokenizer, *, kind: GgufType, about: About
) -> None:
    """Write `tensors` (Hugging Face's names and layout, those of `config`) to `path` in the precision of `kind`.

    llama.cpp passes over a sliding window in these architectures; `open_gguf` reads it.

    Raises:
        UserError: the file format cannot hold this tokenizer, or has no architecture for this shape.
    """
    import gguf

    shapes = their_shapes(config)
    assert shapes.keys() == tensors.keys(), shapes.keys() ^ tensors.keys()
    shape = shape_to_metadata(config)
    architecture = next(iter(shape)).partition(".")[0]
    metadata = _general(kind, about, sum(map(prod, shapes.values()))) | shape
    metadata |= tokenizer_to_metadata(tokenizer, config.vocab_size, about.stop_ids)
    if about.chat_template is not None:
        metadata["tokenizer.chat_template"] = about.chat_template
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in metadata.items():
        _add(writer, name, value)
    rows = list(_rows(config, tensors, kind, architecture))
    for name, tensor, stored in rows:
        raw = gguf.GGMLQuantizationType[stored.name]
        size = gguf.quant_shape_to_byte_shape(tensor.shape, raw)
        writer.add_tensor_info(name, size, np.dtype(np.uint8), prod(size), raw_dtype=raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, stored in rows:
            writer.write_tensor_data(pack(tensor.read(), stored.name))
    finally:
        writer.close()


def rounded(name: str, tensor: Tensor, kind: GgufType) -> Tensor:
    """Return `tensor`, whose name is Hugging Face's, as it is read back from a file of `kind`: the same bits."""
    stored = _stored_type(name, tensor.shape, kind)
    if stored.name in FLOATS:
        return tensor.astype(FLOATS[stored.name])
    return Tensor(tensor.shape, np.dtype(np.float32), partial(_there_and_back, tensor, stored))


def _stored_type(name: str, shape: tuple[int, ...], kind: GgufType) -> GgufType:
    """Return what a weight is stored as.

    As in convert_hf_to_gguf.py: norms and biases as float32, rows that are no whole blocks as float16. Where blocks
    have 4 or 5 bits a weight, embedding and head have 8: llama-quantize takes Q6_K, which gguf-py cannot write.
    """
    if len(shape) < 2:
        return GgufType.F32
    if kind.name in FLOATS:
        return kind
    if shape[-1] % BLOCK:
        return GgufType.F16
    return GgufType.Q8_0 if name in VOCABULARY else kind


def _rows(
    config: LlamaConfig, tensors: Tensors, kind: GgufType, architecture: str
) -> Iterator[tuple[str, Tensor, GgufType]]:
    """Yield (name, tensor, type) of all that a file holds, in its order and layout."""
    if config.rope_scaling is not None:
        yield ROPE_FACTORS, as_tensor(scaling_to_factors(config)), GgufType.F32
    pairs = partial(to_pairs, head_dim=config.head_dim)
    for name in their_shapes(config):
        tensor = tensors[name].then(pairs) if turns_rows(name, architecture) else tensors[name]
        stored = _stored_type(name, tensor.shape, kind)
        yield gguf_name(name), tensor, stored


def _there_and_back(tensor: Tensor, stored: GgufType) -> np.ndarray:
    packed = pack(tensor.read(), stored.name)
    return unpack(lambda start, count: packed[start : start + count], stored.name, tensor.shape)


def _general(kind: GgufType, about: About, weights: int) -> dict[str, object]:
    import gguf

    prefix = "ALL" if kind == GgufType.F32 else "MOSTLY"
    return {
        "general.type": "model",
        "general.name": about.name,
        "general.size_label": gguf.size_label(weights, weights, 0, 0),
        "general.file_type": int(gguf.LlamaFileType[f"{prefix}_{kind.name}"]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _add(writer: "gguf.GGUFWriter", name: str, value: object) -> None:
    """Put a value into the header under the type that llama.cpp expects of its kind."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        assert isinstance(value, list), (name, value)
        writer.add_array(name, value)
