"""GGUF files, llama.cpp's, as a Source: weights of every type that gguf-py can dequantise, tokenizer, chat template."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from easylm_like.convert.gguf.blocks import FLOATS, can_unpack, unpack
from easylm_like.convert.gguf.header import Header, Stored, read_header
from easylm_like.convert.gguf.names import (
    INTERLEAVED,
    LAYOUT,
    ROPE_FACTORS,
    Metadata,
    gguf_name,
    is_scaled_by,
    scaling_from_factors,
    shape_from_metadata,
    turns_rows,
)
from easylm_like.convert.gguf.tokenizer import tokenizer_from_metadata
from easylm_like.convert.reference import reference_logits
from easylm_like.convert.rope_rows import to_halves
from easylm_like.convert.shape import read_hinted_shape
from easylm_like.convert.source import Hints, Source
from easylm_like.data.template import get_template
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.config import config_from_hf, shape_to_hf
from easylm_like.hf.keys import their_shapes
from easylm_like.hf.tensors import Tensor, compare_shapes
from easylm_like.model.config import LlamaConfig


def open_gguf(path: Path, hints: Hints) -> Source:
    """Return the model of a GGUF file, or of a split one, given its first part; quantised weights read as float32.

    Llama 3.1's scaling of RoPE and Mistral's window are not in every file; `hints.shape` says them.

    Raises:
        UserError: it is damaged, not computed here, or its tensors, all of which are listed, are not those of its
            sizes.
    """
    header, where = read_header(path), str(path)
    metadata = header.metadata
    factors = _read(header.tensors[ROPE_FACTORS]) if ROPE_FACTORS in header.tensors else None
    fields = _fields(header, factors, hints, where)
    config = config_from_hf(fields, where)
    if factors is not None and not is_scaled_by(config, factors):
        raise UserError(
            f"{where}: its {ROPE_FACTORS} is not what {hints.shape} would make; give the shape of this model"
        )
    native = _native_tensors(header, config, where)
    architecture = str(metadata["general.architecture"])
    layout = replace(LAYOUT, interleaved=architecture in INTERLEAVED)
    tokenizer = _tokenizer(metadata, hints, where)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{where}: {tokenizer.vocab_size} tokens, but {config.vocab_size} rows in token_embd.weight")
    template = metadata.get("tokenizer.chat_template")
    return Source(
        path=path,
        format="GGUF file",
        config=config,
        tensors=_tensors(native, config, architecture),
        logits=partial(reference_logits, fields, native, layout=layout),
        tokenizer=tokenizer,
        template=get_template(hints.template) if hints.template else None,
        chat_template=template if isinstance(template, str) else None,
        stop_ids=_stop_ids(metadata, tokenizer),
        origin={"path": where} | {key: value for key, value in metadata.items() if key.startswith("general.")},
    )


def _fields(header: Header, factors: np.ndarray | None, hints: Hints, where: str) -> dict[str, object]:
    """Return the fields of a config.json; the rows of the embedding and a missing head are the tensors' to say."""
    found = shape_from_metadata(header.metadata, where)
    embed = header.tensors.get("token_embd.weight")
    if embed is None:
        raise UserError(f"{where}: token_embd.weight is missing")
    own = {"vocab_size": embed.shape[0], "tie_word_embeddings": "output.weight" not in header.tensors}
    if hints.shape is not None:
        return shape_to_hf(read_hinted_shape(hints.shape)) | own
    return found | own | ({} if factors is None else {"rope_scaling": scaling_from_factors(factors, found, where)})


def _native_tensors(header: Header, config: LlamaConfig, where: str) -> dict[str, Tensor]:
    """Return the file's arrays by its own names; raise UserError with all that is wrong with them."""
    wanted = {gguf_name(name): shape for name, shape in their_shapes(config).items()}
    stored = {name: tensor for name, tensor in header.tensors.items() if name != ROPE_FACTORS}
    problems = compare_shapes(stored, wanted)
    kinds = dict.fromkeys(tensor.kind for tensor in stored.values())
    problems += [f"the type {kind} cannot be dequantised by gguf-py" for kind in kinds if not can_unpack(kind)]
    if problems:
        raise UserError(f"{where}: the tensors are not those of a model of its sizes: {'; '.join(problems)}")
    return {
        name: Tensor(one.shape, FLOATS.get(one.kind, FLOATS["F32"]), partial(_read, one))
        for name, one in stored.items()
    }


def _tensors(native: dict[str, Tensor], config: LlamaConfig, architecture: str) -> dict[str, Tensor]:
    named = {name: native[gguf_name(name)] for name in their_shapes(config)}
    halves = partial(to_halves, head_dim=config.head_dim)
    return {name: one.then(halves) if turns_rows(name, architecture) else one for name, one in named.items()}


def _read(stored: Stored) -> np.ndarray:
    return unpack(partial(_bytes, stored), stored.kind, stored.shape)


def _bytes(stored: Stored, start: int, count: int) -> np.ndarray:
    found = np.fromfile(stored.path, np.uint8, count, offset=stored.offset + start)
    if len(found) != count:
        raise UserError(f"{stored.path}: has become shorter since it was opened")
    return found


def _tokenizer(metadata: Metadata, hints: Hints, where: str) -> Tokenizer | None:
    if hints.tokenizer is not None:
        return load_tokenizer(hints.tokenizer)
    return tokenizer_from_metadata(metadata, where)


def _stop_ids(metadata: Metadata, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Return the ids that end a turn or a message beside EOS."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    own = None if tokenizer is None else tokenizer.eos_id
    return tuple(dict.fromkeys(one for one in ids if isinstance(one, int) and one != own))
