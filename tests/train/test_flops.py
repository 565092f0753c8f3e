"""Operations of a step against torch's own counter, and weights against transformers' count."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from easylm_like.data.loader import Batch
from easylm_like.model.config import LlamaConfig
from easylm_like.train.flops import Work, count_weights, palm_flops, peak_tflops, strict_flops, visible_pairs

WIDE = LlamaConfig(vocab_size=300, d_model=32, d_ff=48, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16)
FAMILY = {
    "llama": ("LlamaConfig", {}),
    "tied": ("LlamaConfig", {"tie_embeddings": True}),
    "qwen2": ("Qwen2Config", {"qkv_bias": True, "head_dim": 8}),
    "qwen3": ("Qwen3Config", {"qk_norm": True}),
}


def reference(shape: LlamaConfig, kind: str) -> transformers.PreTrainedModel:
    """Return transformers' model of this shape; its attention multiplies whole matrices, so every operation shows."""
    config = getattr(transformers, kind)(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_embeddings,
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize(("kind", "switches"), FAMILY.values(), ids=FAMILY)
def test_weights_are_those_of_transformers(kind: str, switches: dict[str, object]) -> None:
    shape = dataclasses.replace(WIDE, **switches)
    assert count_weights(shape) == reference(shape, kind).num_parameters()


def test_a_step_takes_what_torch_counts() -> None:
    rows, length = 2, 24
    model = reference(WIDE, "LlamaConfig")
    tokens = torch.randint(WIDE.vocab_size, (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.square().sum().backward()
    n = rows * length
    every_pair = Work(positions=n, tokens=n, trained=n, pairs=rows * length**2)
    assert strict_flops(WIDE, every_pair) == counter.get_total_flops()
    looked_up = 6 * n * (WIDE.vocab_size * WIDE.d_model)
    norms = 6 * n * (2 * WIDE.n_layers + 1) * WIDE.d_model
    assert palm_flops(WIDE, every_pair, length) == counter.get_total_flops() + looked_up + norms


def test_the_head_is_counted_for_tokens_with_a_loss_alone() -> None:
    some, none = (strict_flops(WIDE, Work(64, 60, trained, 100)) for trained in (7, 0))
    assert some - none == 7 * 6 * 32 * 300


@pytest.mark.parametrize("window", [None, 1, 5, 9, 1000])
def test_pairs_are_those_of_the_mask(batch: Batch, window: int | None) -> None:
    segments, positions = batch.segments, batch.positions
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    seen &= positions[:, :, None] >= positions[:, None, :]
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    lengths = np.array([(row == segment).sum() for row in segments for segment in range(1, row.max() + 1)])
    assert lengths.max() > 9
    assert visible_pairs(lengths, window).sum() == seen.sum()


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA RTX A1000", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_name_of_the_device(kind: str, peak: float | None) -> None:
    assert peak_tflops(kind) == peak
