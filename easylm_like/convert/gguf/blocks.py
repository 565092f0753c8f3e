"""Weights as ggml stores them, packed and unpacked in pieces, so that few temporary arrays of a matrix's size exist.

Blocks lie one after another whatever the rows are. Given one long row gguf-py works on it whole, without Python's lock
for most of the time; given a matrix it loops over 16 rows at a time.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np

from easylm_like.hf.tensors import DTYPES

FLOATS = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}  # kept in their own dtype
CHUNK = 1 << 18  # weights at once; a multiple of every block


def can_unpack(kind: str) -> bool:
    """Return whether arrays of this ggml type can be read."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    stored = GGMLQuantizationType[kind]
    try:
        return kind in FLOATS or dequantize(np.zeros((1, GGML_QUANT_SIZES[stored][1]), np.uint8), stored).size > 0
    except NotImplementedError:  # gguf-py's word for a type that it knows and cannot read
        return False


def pack(array: np.ndarray, kind: str) -> np.ndarray:
    """Return the bytes [n] of an array whose rows are whole blocks."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    flat = np.ascontiguousarray(array).reshape(-1)
    if kind in FLOATS:
        with np.errstate(over="ignore"):  # what becomes infinite is found in what was written, and told by name
            return flat.astype(FLOATS[kind], copy=False).view(np.uint8)
    stored = GGMLQuantizationType[kind]
    block, block_bytes = GGML_QUANT_SIZES[stored]
    packed = np.empty((flat.size // block, block_bytes), np.uint8)

    def work(first: int) -> None:
        part = quantize(flat[None, first : first + CHUNK].astype(np.float32), stored)
        packed[first // block : (first + CHUNK) // block] = part.reshape(-1, block_bytes)

    _in_threads(work, flat.size)
    return packed.reshape(-1)


def unpack(take: Callable[[int, int], np.ndarray], kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array from its bytes, of which `take(start, count)` gives some; one that is quantised in float32."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    size = prod(shape)
    if kind in FLOATS:
        return take(0, size * FLOATS[kind].itemsize).view(FLOATS[kind]).reshape(shape)
    stored = GGMLQuantizationType[kind]
    block, block_bytes = GGML_QUANT_SIZES[stored]
    whole = np.empty(size, np.float32)

    def work(first: int) -> None:
        count = min(CHUNK, size - first) // block * block_bytes
        whole[first : first + CHUNK] = dequantize(take(first // block * block_bytes, count)[None], stored)[0]

    _in_threads(work, size)
    return whole.reshape(shape)


def _in_threads(work: Callable[[int], None], size: int) -> None:
    """Call work(first) for every CHUNK of `size` weights."""

    def quietly(first: int) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number is looked for in what was written
            work(first)

    starts = range(0, size, CHUNK)
    with ThreadPoolExecutor(max(1, min(len(starts), os.cpu_count() or 1, 8))) as pool:
        list(pool.map(quietly, starts))
