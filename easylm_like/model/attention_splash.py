"""Attention on TPU: Pallas splash attention, which ships with jax (Apache-2.0), over packed rows."""

from functools import cache

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
    splash_attention_mask_info,
)

from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig

Places = tuple[jax.Array, jax.Array]

LANES = 128  # of a TPU's vector unit: the kernel wants blocks of whole lanes
LARGEST_BLOCK = 512  # MaxText's default for every block of the kernel


def why_not_splash(config: LlamaConfig, device: jax.Device) -> str | None:
    """Return why these devices cannot train `config` with splash attention, or None if they can.

    The row length is not in the config: `attend_splash` wants a multiple of 128 and says so when it is traced.
    """
    if device.platform != "tpu":
        return f"it runs on TPU, the devices are {getattr(device, 'device_kind', device.platform)}"
    return None


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

    Raises:
        UserError: rows are not a multiple of 128 tokens.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    (q_segments, _), (k_segments, _) = places
    kernel = _kernel(T, window, interpret)
    # The kernel does not scale. In fp32 and rounded once: H^-0.5 itself, rounded to bfloat16, would change the softmax.
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)

    def row(q_TNH: jax.Array, k_SKH: jax.Array, v_SKH: jax.Array, q_T: jax.Array, k_S: jax.Array) -> jax.Array:
        heads_first = (jnp.swapaxes(x, 0, 1) for x in (q_TNH, k_SKH, v_SKH))
        return jnp.swapaxes(kernel(*heads_first, splash_attention_kernel.SegmentIds(q_T, k_S)), 0, 1)

    return jax.vmap(row)(q_BTNH, k_BSKH, v_BSKH, q_segments, k_segments)


@cache
def _kernel(length: int, window: int | None, interpret: bool) -> splash_attention_kernel.SplashAttentionKernel:
    """Return the kernel for rows of `length` tokens, with its lists of the blocks that a query block has to visit.

    Cached, because the lists take a second of NumPy at 4096 tokens and every layer asks for them. Built by hand instead
    of by `make_splash_mha`, which would make arrays of them that belong to the trace in progress.
    """
    if length % LANES:
        near = max(LANES, length // LANES * LANES)
        raise UserError(
            f"rows of {length} tokens: splash attention wants a multiple of {LANES}; take {near}, or another "
            "model.attention"
        )
    block = max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if length % size == 0)
    shape = (length, length)
    # In a packed row the distance of two tokens of a record is the difference of their places in the row.
    mask: splash_attention_mask.Mask = splash_attention_mask.CausalMask(shape)
    if window is not None:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    heads = splash_attention_mask.MultiHeadMask([mask])  # one list serves all heads
    queries, seen = splash_attention_mask_info.process_mask(heads, (block, block))
    keys, _ = splash_attention_mask_info.process_mask_dkv(heads, (block, block))
    return splash_attention_kernel.SplashAttentionKernel(
        queries,
        queries,
        keys,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="attention",
        mask_function=seen,
        interpret=interpret,
    )
