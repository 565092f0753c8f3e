"""Attention on TPU: Pallas splash attention, which ships with jax (Apache-2.0), over packed rows."""

import jax

from easylm_like.model.config import LlamaConfig

Places = tuple[jax.Array, jax.Array]


def why_not_splash(config: LlamaConfig, device: jax.Device) -> str | None:
    """Return why these devices cannot train `config` with splash attention, or None if they can."""
    return f"it runs on TPU, the devices are {device.device_kind}" if device.platform != "tpu" else "not yet"


def attend_splash(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, places: tuple[Places, Places], *, window: int | None
) -> jax.Array:
    """`attention.attend` for packed rows on TPU."""
    raise NotImplementedError
