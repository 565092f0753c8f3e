"""Attention on NVIDIA Hopper and newer: cuDNN's fused kernel over packed rows."""

import jax

from easylm_like.model.config import LlamaConfig

Places = tuple[jax.Array, jax.Array]


def why_not_cudnn(config: LlamaConfig, device: jax.Device) -> str | None:
    """Return why these devices cannot train `config` with cuDNN's attention, or None if they can."""
    return f"it runs on GPUs, the devices are {device.device_kind}" if device.platform != "gpu" else "not yet"


def attend_cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    places: tuple[Places, Places],
    *,
    window: int | None,
    max_segments: int,
) -> jax.Array:
    """`attention.attend` for packed rows on GPUs."""
    raise NotImplementedError
