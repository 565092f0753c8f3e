"""Attention on TPU: Pallas splash attention, which ships with jax (Apache-2.0), over packed rows."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import jax
import jax.numpy as jnp

Places = tuple[jax.Array, jax.Array]
Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"
LANES = 128  # of a TPU's vector unit: the kernel wants blocks of whole lanes
LARGEST_BLOCK = 512  # MaxText's default for every block of the kernel


def why_not_splash(device: jax.Device, row_length: int) -> str | None:
    """Return why these devices cannot train on such rows with splash attention, or None if they can.

    Every head size can (8 to 256 compile).
    """
    if device.platform != "tpu":
        return f"it runs on TPU, the devices are {getattr(device, 'device_kind', device.platform)}"
    try:
        ships = find_spec(SPLASH) is not None
    except ModuleNotFoundError:  # not even the package it lies in
        ships = False
    if not ships:
        return f"jax {jax.__version__} does not ship it in {SPLASH}"
    near = max(LANES, row_length // LANES * LANES)
    return f"it wants data.row_length to be a multiple of {LANES}, such as {near}" if row_length % LANES else None


def attend_splash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    places: tuple[Places, Places],
    *,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """`attention.attend` for packed rows on TPU.

    Output and log-sum-exp carry the checkpoint name "attention". `interpret` runs the kernel's steps in plain JAX, on
    any device and slowly, for tests.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    (q_segments, _), (k_segments, _) = places
    kernel = _kernel(T, window, _block(T), interpret)
    # The kernel does not scale. In fp32: rounded to bfloat16, the factor of a head size such as 48 is 0.13 % off.
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q_BNTH, k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    return jnp.swapaxes(jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, q_segments, k_segments), 1, 2)


def _block(length: int) -> int:
    """Return the largest block that divides a row of a multiple of 128 tokens."""
    return max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if length % size == 0)


@cache
def _kernel(length: int, window: int | None, block: int, interpret: bool) -> Kernel:
    """Return the kernel for one row: q [N, T, H], k and v [K, T, H], segments [T] of queries and keys -> [N, T, H].

    With it go lists of the blocks that a block of queries has to visit. Cached, because they take a second of NumPy at
    4096 tokens and every layer asks for them. Put together here and not by `make_splash_mha`, which would turn the
    lists into arrays of the trace in progress.
    """
    # Here, because Pallas is slow to import and of use on TPU only.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import (
        process_mask,
        process_mask_dkv,
    )

    shape = (length, length)
    # In a packed row the distance of two tokens of a record is the difference of their places in the row.
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    heads = masks.MultiHeadMask([mask])  # one list serves all heads
    forward, seen = process_mask(heads, (block, block))
    backward, _ = process_mask_dkv(heads, (block, block))
    kernel = splash.SplashAttentionKernel(
        forward,
        forward,  # the gradient of queries visits the same blocks
        backward,
        block_sizes=splash.BlockSizes(block, block, block, block, block, block, block, block),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="attention",
        mask_function=seen,
        interpret=interpret,
    )

    def attend_row(
        q_NTH: jax.Array, k_KSH: jax.Array, v_KSH: jax.Array, q_segments_T: jax.Array, k_segments_S: jax.Array
    ) -> jax.Array:
        out_NTH = kernel(q_NTH, k_KSH, v_KSH, splash.SegmentIds(q_segments_T, k_segments_S))
        assert isinstance(out_NTH, jax.Array)  # and not with its residuals
        return out_NTH

    return attend_row
