"""What the tests of the model share: small shapes of every kind, and their twins in transformers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from easylm_like.convert.load import LoadedModel, load_model
from easylm_like.hf.keys import to_ours
from easylm_like.hf.tensors import as_tensor
from easylm_like.model.config import LlamaConfig, RopeScaling
from easylm_like.model.llama import Params, abstract_model

GQA = LlamaConfig(
    vocab_size=96, d_model=32, d_ff=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, norm_eps=1e-6, max_length=64
)
STRETCH = RopeScaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=32)
SHAPES = {
    "gqa": GQA,
    "mha": replace(GQA, n_kv_heads=4, n_layers=1),
    "one key head, tied": replace(GQA, n_kv_heads=1, n_layers=3, tie_embeddings=True),
    "llama3 rope": replace(GQA, head_dim=16, rope_theta=500.0, rope_scaling=STRETCH),
    "narrow heads": replace(GQA, head_dim=6, rope_theta=5e5, norm_eps=0.1),
    "mistral": replace(GQA, n_layers=3, sliding_window=7),
    "qwen2": replace(GQA, rope_theta=1e3, qkv_bias=True),
    "qwen2, tied, with a window": replace(GQA, qkv_bias=True, sliding_window=5, tie_embeddings=True),
    "qwen3": replace(GQA, d_model=24, head_dim=16, n_layers=3, qk_norm=True),  # 4 heads of 16 from a width of 24
    "smollm2": replace(GQA, d_model=36, n_heads=9, n_kv_heads=3, head_dim=4, rope_theta=1e5, tie_embeddings=True),
}


@dataclass(frozen=True)
class Twins:
    """One set of weights in transformers and in ours."""

    config: LlamaConfig
    theirs: transformers.PreTrainedModel
    params: Params


def hf_config(config: LlamaConfig) -> transformers.PreTrainedConfig:
    """Return transformers' own description of a shape, by the class of the family that it belongs to."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_frequency_factor}
        rope |= {"high_freq_factor": scaling.high_frequency_factor}
        rope |= {"original_max_position_embeddings": scaling.original_length}
    kind, more = transformers.LlamaConfig, {}
    if config.qkv_bias or config.qk_norm:
        kind = transformers.Qwen3Config if config.qk_norm else transformers.Qwen2Config
        more = {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    elif config.sliding_window:
        kind = transformers.MistralConfig
    if config.sliding_window:
        more["sliding_window"] = config.sliding_window
    return kind(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.max_length,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )


@pytest.fixture(scope="session")
def twins() -> Callable[[str], Twins]:
    """Return a function that makes the twins of a shape: torch draws the weights, the table of convert/ moves them."""

    def make(name: str) -> Twins:
        config, draw = SHAPES[name], torch.Generator().manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(hf_config(config)).eval()
        with torch.no_grad():
            for key, weight in theirs.named_parameters():
                weight.normal_(0.0, 0.25, generator=draw)
                weight += key.endswith("norm.weight")  # the scales of norms lie around 1
        arrays = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
        if config.tie_embeddings:
            del arrays["lm_head.weight"]
        stacks = to_ours({key: as_tensor(array) for key, array in arrays.items()}, config, name)
        return Twins(config, theirs, {key: jax.numpy.asarray(stack.read()) for key, stack in stacks.items()})

    return make


@pytest.fixture(scope="session")
def forward() -> Callable[..., jax.Array]:
    """Return a jitted function (config, params, tokens, segments, positions) -> fp32 logits [B, T, V]."""

    @partial(jax.jit, static_argnums=0)
    def run(
        config: LlamaConfig, params: Params, tokens: jax.Array, segments: jax.Array, positions: jax.Array
    ) -> jax.Array:
        model = nnx.merge(abstract_model(config)[0], params)
        x_BTD, _ = model(tokens, (segments, positions))
        return model.logits(x_BTD)

    return run


@dataclass(frozen=True)
class Packed:
    """Rows of several records: tokens, segments and positions [B, T], and (row, slice) of each record."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    places: list[tuple[int, slice]]


@pytest.fixture(scope="session")
def packed() -> Packed:
    """Return four rows of 24: three records, two with padding, one that fills it, and nothing but padding."""
    tokens, segments, positions = (np.zeros((4, 24), np.int32) for _ in range(3))
    places, random = [], np.random.default_rng(0)
    for row, lengths in enumerate([(7, 5, 12), (9, 4), (24,), ()]):
        start = 0
        for segment, length in enumerate(lengths, start=1):
            where = slice(start, start + length)
            tokens[row, where] = random.integers(0, GQA.vocab_size, length)
            segments[row, where], positions[row, where] = segment, np.arange(length)
            places.append((row, where))
            start += length
    return Packed(tokens, segments, positions, places)


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> LoadedModel:
    """Return the real weights of a small story teller."""
    return load_model(shared_data / "models" / "stories260K-hf", "plain")
