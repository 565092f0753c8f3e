"""The order of the rows that make queries and keys: which two of a head RoPE turns together.

Meta's code, and with it EasyLM, llama2.c and llama.cpp, turns neighbours (2i, 2i + 1); Hugging Face's turns i and
i + H / 2. The same weights are the same model in both, with the rows of every head in another order.
"""

import numpy as np


def to_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Return [N * H, ...] rows whose heads have interleaved pairs in Hugging Face's order."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def to_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Return [N * H, ...] rows of Hugging Face's order with the pairs interleaved; the inverse of `to_halves`."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
