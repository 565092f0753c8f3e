"""Attention on NVIDIA Hopper and newer: cuDNN's fused kernel over packed rows.

jax lowers to it in a private module, whose public function cannot serve here: before jax PR 39521 it gave grouped heads
wrong offsets, it asks the local GPU what the target can do (there is none where one compiles ahead), and nothing in it
can be named for remat. Its two primitives can, and are called here with offsets of our own. Called inside
`attention.attend`'s shard_map they need none of the private module's partitioning.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig

Places = tuple[jax.Array, jax.Array]
Gradients = tuple[jax.Array, jax.Array, jax.Array]

OPERANDS: tuple[str, ...] = ("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")
OPERANDS += ("page_table_k", "page_table_v")
OPTIONS = ("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["real_BT", "slot_BT", "at_BT", "lengths", "q_offsets", "k_offsets"],
    meta_fields=[],
)
@dataclass(frozen=True, slots=True)
class _Records:
    """Where the records lie. A slot is a record's number among all of a device's rows, of B * M that there can be."""

    real_BT: jax.Array  # is it no padding
    slot_BT: jax.Array  # the slot of the token's record; at padding one too many
    at_BT: jax.Array  # the token's place in its record
    lengths: jax.Array  # [B, M] of the slots in order, tokens; then 0
    q_offsets: jax.Array  # [B, M + 1] where a slot begins in q [B, T, N, H], elements; then its size
    k_offsets: jax.Array  # the same in k [B, T, K, H]


def why_not_cudnn(config: LlamaConfig, device: jax.Device) -> str | None:
    """Return why these devices cannot train `config` with cuDNN's attention, or None if they can.

    Limits are those of jax's own checks and of cuDNN 9's table of what SDPA supports in training on Hopper.
    """
    if device.platform not in ("gpu", "cuda"):  # "cuda" is what a topology calls itself where one compiles ahead
        return f"it runs on NVIDIA GPUs, the devices are {getattr(device, 'device_kind', device.platform)}"
    capability = str(getattr(device, "compute_capability", None) or "9.0")
    if not all(part.isdecimal() for part in capability.split(".")):  # AMD's are called gfx942 and the like
        return f"it runs on NVIDIA GPUs, the devices are {capability}"
    if tuple(int(part) for part in capability.split(".")) < (9, 0):
        return f"packed rows need compute capability 9.0 (Hopper), the devices have {capability}"
    if config.compute.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not {config.compute.dtype}"
    if config.head_dim % 8 or config.head_dim > 256:
        return f"head_dim must be a multiple of 8 and at most 256, got {config.head_dim}"
    if config.compute.forget:
        return "it has no way to hide single tokens (forget)"
    if _kernels() is None:
        return f"jax {jax.__version__} does not have the private functions that this was written for (0.10)"
    return None


def cudnn_scratch(config: LlamaConfig, rows: int, row_length: int) -> int:
    """Return the bytes that the backward pass takes for `rows` rows on one device, beside what XLA plans.

    cuDNN sums the gradient of q in fp32, for as many tokens as if each of the `max_segments` records that a row may
    have were as long as the row (cudnn-frontend's source, where the total length is not set).
    """
    return 4 * rows * config.compute.max_segments * row_length * config.n_heads * config.head_dim


def attend_cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    places: tuple[Places, Places],
    *,
    window: int | None,
    max_segments: int,
) -> jax.Array:
    """`attention.attend` for packed rows on GPUs; zero at padding, in gradients too.

    No row may have more than `max_segments` records: the whole row comes out as NaN. For the backward pass cuDNN takes
    4 * B * max_segments * T * N * H bytes of scratch, so pack with few records a row. Output and softmax statistics
    carry the checkpoint name "attention".

    Raises:
        UserError: `max_segments` is not known, or the rows of one device exceed cuDNN's 32-bit offsets.
    """
    segments_BT, positions_BT = places[0]
    if max_segments < 1:
        raise UserError("cuDNN's attention must know how many records a row can have: set max_segments")
    if q_BTNH.size >= 2**31:
        raise UserError(
            f"queries of shape {q_BTNH.shape} on one device: cuDNN's offsets end at 2^31 elements; "
            "take smaller micro-batches"
        )
    records = _records(segments_BT, positions_BT, max(max_segments, 2), (q_BTNH.shape, k_BSKH.shape))
    out_BTNH = _attend(window, q_BTNH, k_BSKH, v_BSKH, records)
    too_many_B = segments_BT.max(axis=1) > max_segments
    return jnp.where(too_many_B[:, None, None, None], jnp.nan, out_BTNH)


def record_bounds(segments_BT: jax.Array, max_segments: int) -> tuple[jax.Array, jax.Array]:
    """Return (lengths, offsets), int32 [B, max_segments] each, in tokens: records 1.. of a row follow one another.

    A record that a row lacks has length 0 and begins where the last one ends. Records beyond `max_segments` are left
    out.
    """
    numbers = jnp.arange(1, max_segments + 1, dtype=segments_BT.dtype)
    lengths_BM = jnp.sum(segments_BT[:, :, None] == numbers, axis=1, dtype=jnp.int32)
    return lengths_BM, jnp.cumsum(lengths_BM, axis=1) - lengths_BM


def _records(
    segments_BT: jax.Array, positions_BT: jax.Array, max_segments: int, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> _Records:
    """Number the records through all rows, as cuDNN wants them; `shapes` are those of the queries and of the keys."""
    B, T = segments_BT.shape
    slots = B * max_segments
    lengths_BM, offsets_BM = record_bounds(segments_BT, max_segments)
    count_B = jnp.sum(lengths_BM > 0, axis=1)
    first_B = jnp.cumsum(count_B) - count_B
    number_M = jnp.arange(max_segments)
    slot_BM = jnp.where(number_M < count_B[:, None], first_B[:, None] + number_M, slots)
    lengths = jnp.zeros(slots, jnp.int32).at[slot_BM].set(lengths_BM, mode="drop")
    starts_BM = offsets_BM + T * jnp.arange(B, dtype=jnp.int32)[:, None]
    starts = jnp.full(B * (max_segments + 1), B * T, jnp.int32).at[slot_BM].set(starts_BM, mode="drop")
    real_BT = segments_BT > 0
    # XLA reads the first B * M lengths and B * M + 1 offsets; two axes are what tells it M.
    q_stride, k_stride = (shape[2] * shape[3] for shape in shapes)
    offsets = starts.reshape(B, max_segments + 1)
    return _Records(
        real_BT=real_BT,
        slot_BT=jnp.where(real_BT & (segments_BT <= max_segments), first_B[:, None] + segments_BT - 1, slots),
        at_BT=positions_BT,
        lengths=lengths.reshape(B, max_segments),
        q_offsets=offsets * q_stride,
        k_offsets=offsets * k_stride,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    window: int | None, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, records: _Records
) -> jax.Array:
    out_BTNH, *_ = _call_forward(q_BTNH, k_BSKH, v_BSKH, records, window, training=False)
    return _zero_padding(out_BTNH, records)


def _attend_and_save(
    window: int | None, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, records: _Records
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, _Records, jax.Array, jax.Array]]:
    out_BTNH, stats_slots_NT = _call_forward(q_BTNH, k_BSKH, v_BSKH, records, window, training=True)
    out_BTNH = checkpoint_name(_zero_padding(out_BTNH, records), "attention")
    # The statistics have T places for each of B * M slots, of which all slots together use B * T: save those.
    stats_BTN = stats_slots_NT.at[records.slot_BT, :, records.at_BT].get(mode="fill", fill_value=0.0)
    stats_BTN = checkpoint_name(stats_BTN, "attention")
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, records, out_BTNH, stats_BTN)


def _attend_backward(
    window: int | None,
    saved: tuple[jax.Array, jax.Array, jax.Array, _Records, jax.Array, jax.Array],
    d_out_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTNH, k_BSKH, v_BSKH, records, out_BTNH, stats_BTN = saved
    stats_slots_NT = jnp.zeros((records.lengths.size, *q_BTNH.shape[2:0:-1]), jnp.float32)
    stats_slots_NT = stats_slots_NT.at[records.slot_BT, :, records.at_BT].set(stats_BTN, mode="drop")
    d_out_BTNH = _zero_padding(d_out_BTNH, records)
    gradients = _call_backward((q_BTNH, k_BSKH, v_BSKH), records, stats_slots_NT, out_BTNH, d_out_BTNH, window)
    d_q_BTNH, d_k_BSKH, d_v_BSKH = (_zero_padding(gradient, records) for gradient in gradients)
    return d_q_BTNH, d_k_BSKH, d_v_BSKH, None


_attend.defvjp(_attend_and_save, _attend_backward)


def _zero_padding(x_BTNH: jax.Array, records: _Records) -> jax.Array:
    """cuDNN writes nothing at padding: what lies there may be NaN, and NaN * 0 is NaN."""
    return jnp.where(records.real_BT[:, :, None, None], x_BTNH, 0)


def _call_forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, records: _Records, window: int | None, *, training: bool
) -> list[jax.Array]:
    """Return cuDNN's output [B, T, N, H] and, if `training`, softmax statistics fp32 [B * M, N, T]."""
    operands, options = _arguments(q_BTNH, k_BSKH, v_BSKH, records, window)
    return list(_require_kernels()._dot_product_attention_fwd_p.bind(*operands, is_training=training, **options))


def _call_backward(
    qkv: Gradients,
    records: _Records,
    stats_slots_NT: jax.Array,
    out_BTNH: jax.Array,
    d_out_BTNH: jax.Array,
    window: int | None,
) -> Gradients:
    """Return cuDNN's gradients with respect to q, k and v."""
    operands, options = _arguments(*qkv, records, window)
    kernels = _require_kernels()
    d_q, d_k, d_v = kernels._dot_product_attention_bwd_p.bind(
        *operands, stats_slots_NT, out_BTNH, d_out_BTNH, **options
    )
    return d_q, d_k, d_v


def _arguments(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, records: _Records, window: int | None
) -> tuple[tuple[jax.Array, ...], dict[str, object]]:
    """Return OPERANDS and OPTIONS of both primitives."""
    kernels = _require_kernels()
    none = jnp.zeros(0, q_BTNH.dtype)
    places = (records.lengths, records.lengths, records.q_offsets, records.k_offsets)
    options = {
        "scale": q_BTNH.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": kernels.MaskType.PADDING_CAUSAL,
        "layout": kernels.AttentionLayout.BTNH.value,
        "sliding_window_length": window,
    }
    return (q_BTNH, k_BSKH, v_BSKH, none, *places, none, none), options


def _require_kernels() -> ModuleType:
    kernels = _kernels()
    if kernels is None:
        raise UserError(f"jax {jax.__version__} does not have the private functions of cuDNN's attention in jax 0.10")
    return kernels


def _kernels() -> ModuleType | None:
    """Return jax's private module if its two primitives still take what `_arguments` makes."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as kernels

        forward = inspect.signature(kernels._dot_product_attention_fwd_abstract)
        backward = inspect.signature(kernels._dot_product_attention_bwd_abstract)
        names = {"_dot_product_attention_fwd_p", "_dot_product_attention_bwd_p", "MaskType", "AttentionLayout"}
    except (ImportError, AttributeError):
        return None
    saved = ("activation", "fwd_output", "grad_output")
    same = tuple(forward.parameters) == (*OPERANDS, *OPTIONS, "is_training")
    same &= tuple(backward.parameters) == (*OPERANDS, *saved, *OPTIONS)
    return kernels if same and names <= vars(kernels).keys() else None
