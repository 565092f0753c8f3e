"""Angles and rotation against transformers, plain and stretched, at positions near and far."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from easylm_like.model.config import LlamaConfig, RopeScaling
from easylm_like.model.rope import rope_angles, rotate

from .conftest import GQA, SHAPES, hf_config

POSITIONS = np.array([[0, 1, 2, 3, 17, 63], [5, 0, 100, 1000, 4095, 8191]], np.int32)
LLAMA31 = RopeScaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)
CONFIGS = {
    "plain": GQA,
    "theta 5e5": replace(GQA, head_dim=128, rope_theta=5e5),
    "llama3": SHAPES["llama3 rope"],
    "llama3, as published": replace(GQA, head_dim=128, rope_theta=5e5, rope_scaling=LLAMA31),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_rotation_is_that_of_transformers(config: LlamaConfig) -> None:
    heads = np.random.default_rng(0).normal(size=(2, 6, 3, config.head_dim)).astype(np.float32)
    angles = rope_angles(config, jnp.asarray(POSITIONS))
    assert (angles.shape, angles.dtype) == ((2, 6, config.head_dim // 2), jnp.float32)
    theirs = torch.tensor(heads).transpose(1, 2)  # [B, N, T, H]
    cos, sin = LlamaRotaryEmbedding(hf_config(config))(theirs, torch.tensor(POSITIONS, dtype=torch.long))
    wanted, _ = apply_rotary_pos_emb(theirs, theirs, cos, sin)
    # At position 8191 the last bit of a float32 frequency moves an angle by 1e-3.
    got = rotate(jnp.asarray(heads), angles)
    np.testing.assert_allclose(got[0], wanted.transpose(1, 2)[0], atol=2e-5)
    np.testing.assert_allclose(got[1], wanted.transpose(1, 2)[1], atol=4e-3)


def test_all_three_zones_of_the_stretch_are_tried() -> None:
    for name in ("llama3", "llama3, as published"):
        config = CONFIGS[name]
        one = jnp.ones((1, 1), jnp.int32)
        ratio = np.asarray(rope_angles(replace(config, rope_scaling=None), one) / rope_angles(config, one))
        assert ratio.min() == pytest.approx(1.0)  # short wavelengths stay
        assert ratio.max() == pytest.approx(4.0)  # long ones grow by the factor
        assert ((ratio > 1.01) & (ratio < 3.99)).any()  # and some are between


def test_only_the_distance_of_two_positions_matters() -> None:
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 64)).astype(np.float32)
    config = replace(GQA, head_dim=64)

    def score(query: int, key: int) -> float:
        at = [rope_angles(config, jnp.full((1, 1), position)) for position in (query, key)]
        return float(jnp.sum(rotate(jnp.asarray(q), at[0]) * rotate(jnp.asarray(k), at[1])))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 7) == pytest.approx(float(np.sum(q * k)), abs=1e-4)
    assert abs(score(7, 3) - score(3, 7)) > 0.1


def test_rotation_keeps_lengths_and_dtype() -> None:
    x = np.random.default_rng(0).normal(size=(2, 6, 3, 8)).astype(np.float32)
    turned = rotate(jnp.asarray(x), rope_angles(GQA, jnp.asarray(POSITIONS)))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[0, 0], x[0, 0])  # position 0 stays
    half = rotate(jnp.asarray(x, jnp.bfloat16), rope_angles(GQA, jnp.asarray(POSITIONS)))
    assert half.dtype == jnp.bfloat16
    # One rounding at the end, none of the angles: at position 8191 a bfloat16 angle would be off by whole turns.
    np.testing.assert_allclose(half.astype(jnp.float32), turned, atol=0.03)
