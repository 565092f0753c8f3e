"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout of Hugging Face's LLaMA."""

import math

import jax
import jax.numpy as jnp

from easylm_like.model.config import LlamaConfig, RopeScaling


def rope_angles(config: LlamaConfig, positions_BT: jax.Array) -> jax.Array:
    """Return fp32 angles [B, T, H/2]: position times theta^(-2i/H), wavelengths stretched if the config says so."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents  # fp32: logits drift visibly with less
    if config.rope_scaling is not None:
        frequencies = _stretch(frequencies, config.rope_scaling)
    return positions_BT[:, :, None].astype(jnp.float32) * frequencies


def rotate(x_BTNH: jax.Array, angles_BTh: jax.Array) -> jax.Array:
    """Turn each pair (x[i], x[i + H/2]) by its angle, in fp32; returns the dtype of `x_BTNH`."""
    cos, sin = jnp.cos(angles_BTh)[:, :, None], jnp.sin(angles_BTh)[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def _stretch(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Llama 3.1: short wavelengths stay, long ones grow by `factor`, those between are blended linearly."""
    turns = scaling.original_length * frequencies / (2 * math.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    keep = jnp.clip((turns - scaling.low_frequency_factor) / span, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)
