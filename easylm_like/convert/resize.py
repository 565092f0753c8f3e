"""Another number of ids: rows added to the embedding and the head as Alpaca added them, or cut off."""

from dataclasses import replace
from functools import partial

import numpy as np

from easylm_like.convert.reference import reference_logits
from easylm_like.convert.source import Source
from easylm_like.errors import UserError
from easylm_like.hf.config import shape_to_hf
from easylm_like.hf.tensors import Tensor

ROWS_BY_ID = ("model.embed_tokens.weight", "lm_head.weight")
_BLOCK = 2048  # rows in float64 at once


def resize_vocabulary(source: Source, vocab_size: int) -> Source:
    """Return `source` with `vocab_size` ids: new ones have the mean of the old rows, each matrix its own.

    This is `smart_tokenizer_and_embedding_resize` (tatsu-lab/stanford_alpaca, train.py), the mean taken in float64.

    Raises:
        UserError: the tokenizer has ids beyond `vocab_size`.
    """
    old = source.config.vocab_size
    if vocab_size < 1:
        raise UserError(f"a vocabulary must have at least one id, got {vocab_size}")
    if source.tokenizer is not None and vocab_size < source.tokenizer.vocab_size:
        raise UserError(
            f"{source.path}: its tokenizer has {source.tokenizer.vocab_size} ids, a vocabulary must have at least as "
            f"many; got {vocab_size}"
        )
    resized = {
        name: resize_rows(tensor, vocab_size) if name in ROWS_BY_ID else tensor
        for name, tensor in source.tensors.items()
    }
    changed = replace(
        source,
        config=replace(source.config, vocab_size=vocab_size),
        tensors=resized,
        origin={**source.origin, "vocab_size_before": old},
    )
    return source if vocab_size == old else replace(changed, logits=partial(_logits, source, changed))


def resize_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return a matrix [V, D] with `rows` rows: cut off, or with the mean of its own, rounded, in the added ones."""
    return tensor.then(partial(_resize, rows=rows), (rows, *tensor.shape[1:]))


def _resize(matrix: np.ndarray, rows: int) -> np.ndarray:
    if rows <= len(matrix):
        return matrix[:rows]
    blocks = (matrix[start : start + _BLOCK] for start in range(0, len(matrix), _BLOCK))
    total = sum(block.astype(np.float64).sum(axis=0) for block in blocks)
    resized = np.empty((rows, *matrix.shape[1:]), matrix.dtype)
    resized[: len(matrix)] = matrix
    resized[len(matrix) :] = (total / len(matrix)).astype(matrix.dtype)
    return resized


def _logits(source: Source, resized: Source, ids: np.ndarray) -> np.ndarray:
    """Return fp32 logits [..., T, V] of `ids` [..., T], which the old vocabulary has.

    The old ids' are computed from the format's own arrays, as ever. An added id's would be the mean of theirs, if the
    mean row were not rounded: in bfloat16 that is off by more than a proof allows (1.1e-3 of the logits' spread on
    stories260K), so they come from the rows as they are.
    """
    kept = source.logits(ids)[..., : resized.config.vocab_size]
    if kept.shape[-1] == resized.config.vocab_size:
        return kept
    fields = shape_to_hf(resized.config)
    return np.concatenate([kept, reference_logits(fields, resized.tensors, ids)[..., kept.shape[-1] :]], axis=-1)
