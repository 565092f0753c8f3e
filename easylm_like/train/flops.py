"""How many floating-point operations a step needs, by the shape of its model, and what the devices can do.

A matrix product of [m, k] and [k, n] takes 2mkn operations; the backward pass takes it twice more, once for each of the
two factors. Nothing else is counted, nor what remat computes a second time: MFU is about the model, not the program.
"""

import re
from dataclasses import dataclass

import numpy as np

from easylm_like.model.config import LlamaConfig

# 10^12 dense bfloat16 FLOP/s of one jax.Device, by words of its device_kind; the first that fits counts. NVIDIA: the
# data sheets, half of the figure "with sparsity" where only that is given. TPU: cloud.google.com/tpu/docs, the figure
# of a chip, or half of it where jax sees a chip as two devices (v2, v3, 7x: jax/_src/pallas/mosaic/tpu_info.py).
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.0),
    ("TPU v2", 23.0),
    ("TPU v3", 61.5),
    ("TPU v4 lite", 138.0),
    ("TPU v4", 275.0),
    ("TPU v5 lite", 197.0),
    ("TPU v5e", 197.0),
    ("TPU v5", 459.0),
    ("TPU v5p", 459.0),
    ("TPU v6 lite", 918.0),
    ("TPU v6e", 918.0),
    ("TPU7x", 1153.5),
    ("TPU7", 2307.0),
)


@dataclass(frozen=True, slots=True)
class Work:
    """What was computed on, over all hosts: `pairs` are the (query, key) pairs that attention may look at."""

    positions: int  # rows * row length, padding and all
    tokens: int  # without padding
    trained: int  # with a weight in the loss
    pairs: int


def peak_tflops(device_kind: str) -> float | None:
    """Return the dense bfloat16 peak of a jax.Device in 10^12 FLOP/s, or None if its kind is not known here."""
    if re.search(r"\b(MIG|Laptop)\b", device_kind):  # a slice of a card, or a smaller one under the same name
        return None
    return next((peak for name, peak in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_kind)), None)


def visible_pairs(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """Return int64 [records]: how many (query, key) pairs attention needs in a record of so many tokens.

    The query at position p sees min(p + 1, window) keys, its own among them, and none of another record.
    """
    seen = lengths.astype(np.int64) if window is None else np.minimum(lengths.astype(np.int64), window)
    return seen * (seen + 1) // 2 + (lengths - seen) * seen


def count_weights(shape: LlamaConfig) -> int:
    """Return the number of weights of a model, without the rows that pad its vocabulary."""
    norms = 2 * shape.d_model + (2 * shape.head_dim if shape.qk_norm else 0)
    biases = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim if shape.qkv_bias else 0
    tables = (1 if shape.tie_embeddings else 2) * shape.vocab_size * shape.d_model
    return tables + _matmul_weights(shape) + shape.n_layers * (norms + biases) + shape.d_model


def strict_flops(shape: LlamaConfig, work: Work) -> float:
    """Return the FLOPs, forward and backward, of what the loss depends on, and of nothing else.

    6 for every weight of a layer's matrices and every token; 6 D V for every token with a loss, since the head is
    applied to no other (the embedding is looked up); 12 L N H for every pair: scores and weighted values are 2 H each
    a head, three times.
    """
    head = shape.d_model * shape.vocab_size
    attention = 12 * shape.n_layers * shape.n_heads * shape.head_dim
    return 6.0 * (_matmul_weights(shape) * work.tokens + head * work.trained) + attention * work.pairs


def palm_flops(shape: LlamaConfig, work: Work, row_length: int) -> float:
    """Return the FLOPs as PaLM counts them (arXiv 2204.02311, appendix B): 6 P + 12 L N H T for every position.

    Every weight, the embedding too, works on every position, and every query sees the whole row of T.
    """
    attention = 12.0 * shape.n_layers * shape.n_heads * shape.head_dim * row_length
    return (6.0 * count_weights(shape) + attention) * work.positions


def _matmul_weights(shape: LlamaConfig) -> int:
    attention = 2 * (shape.n_heads + shape.n_kv_heads) * shape.head_dim * shape.d_model
    return shape.n_layers * (attention + 3 * shape.d_model * shape.d_ff)
