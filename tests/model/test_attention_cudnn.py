"""cuDNN's attention without cuDNN: the bounds of records, what is handed to the kernel, and how it lowers.

The kernel's twin below does in NumPy what XLA asks of cuDNN (GetCudnnFlashAttentionOperationGraph in XLA's
stream_executor/cuda/cuda_dnn.cc): B * M sequences at offsets into flat arrays, statistics [B * M, N, T], and nothing
is written anywhere else.
"""

import re
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_like.errors import UserError
from easylm_like.model import attention_cudnn
from easylm_like.model.attention import attend
from easylm_like.model.attention_cudnn import attend_cudnn, record_bounds, why_not_cudnn
from easylm_like.model.config import Compute
from easylm_like.model.presets import get_preset

B, T, N, K, H, M = 3, 24, 4, 2, 8, 5
Rows = tuple[np.ndarray, np.ndarray]


def packed(rows: list[list[int]], length: int = T) -> Rows:
    """Return segments and positions [B, T] of rows of records with these lengths, padding at the end."""
    segments, positions = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for row, lengths in enumerate(rows):
        at = 0
        for number, size in enumerate(lengths, start=1):
            segments[row, at : at + size], positions[row, at : at + size] = number, np.arange(size)
            at += size
    return segments, positions


ROWS = packed([[7, 1, 9, 2], [24], [5, 4, 3, 2, 1]])


def drawn(seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N)]


def sequence(flat: np.ndarray, offset: int, length: int, heads: int) -> np.ndarray:
    """Return the view [length, heads, H] that begins at an element of a flat array."""
    return flat[offset : offset + length * heads * H].reshape(length, heads, H)


def twin(
    window: int | None,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    lengths: np.ndarray,
    q_offsets: np.ndarray,
    k_offsets: np.ndarray,
    *backward: np.ndarray,
) -> list[np.ndarray]:
    """Return (output, statistics), or (dq, dk, dv) if given statistics, output and d_output; NaN where not written."""
    results = [np.full_like(x, np.nan) for x in ((q, k, v) if backward else (q,))]
    if not backward:
        results.append(np.full((lengths.size, N, T), np.nan, np.float32))
    if backward:
        assert np.isfinite(backward[2]).all()  # a kernel reads whole tiles, beyond a record's end too
    flat = [x.reshape(-1) for x in (q, k, v)]
    for slot, length in enumerate(lengths.reshape(-1)):
        q_at, k_at = q_offsets.reshape(-1)[slot], k_offsets.reshape(-1)[slot]
        q_TNH = sequence(flat[0], q_at, length, N)
        k_TNH, v_TNH = (np.repeat(sequence(x, k_at, length, K), N // K, axis=1) for x in flat[1:])
        back = np.arange(length)[:, None] - np.arange(length)
        seen = (back >= 0) & (back < (window or T))
        scores = np.where(seen, np.einsum("tnh,snh->nts", q_TNH, k_TNH) * H**-0.5, -np.inf)
        if not backward:
            most = scores.max(-1, keepdims=True, initial=-np.inf)
            stats = np.log(np.exp(scores - most).sum(-1)) + most[..., 0]
            results[1][slot, :, :length] = stats
            out = np.einsum("nts,snh->tnh", np.exp(scores - stats[..., None]), v_TNH)
            sequence(results[0].reshape(-1), q_at, length, N)[...] = out
            continue
        stats, out, d_out = backward
        weights = np.exp(scores - stats[slot, :, :length, None])
        out, d_out = (sequence(x.reshape(-1), q_at, length, N) for x in (out, d_out))
        d_weights = np.einsum("tnh,snh->nts", d_out, v_TNH)
        d_scores = weights * (d_weights - np.sum(out * d_out, -1).T[..., None]) * H**-0.5
        shape = (length, K, N // K, H)
        sequence(results[0].reshape(-1), q_at, length, N)[...] = np.einsum("nts,snh->tnh", d_scores, k_TNH)
        d_k = np.einsum("nts,tnh->snh", d_scores, q_TNH).reshape(shape).sum(2)
        d_v = np.einsum("nts,tnh->snh", weights, d_out).reshape(shape).sum(2)
        sequence(results[1].reshape(-1), k_at, length, K)[...] = d_k
        sequence(results[2].reshape(-1), k_at, length, K)[...] = d_v
    return results


class TwinPrimitive:
    """Binds like jax's primitive, runs the twin."""

    def __init__(self, backward: bool) -> None:
        self.backward = backward

    def bind(self, *operands: jax.Array, **options: object) -> list[jax.Array]:
        q, k, v, _, lengths, k_lengths, q_offsets, k_offsets, _, _, *rest = operands
        assert lengths is k_lengths
        assert options["scale"] == H**-0.5
        shapes = [q, k, v] if self.backward else [q, jax.ShapeDtypeStruct((lengths.size, N, T), jnp.float32)]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes]
        run = partial(twin, options["sliding_window_length"])
        found = jax.pure_callback(
            lambda *args: run(*map(np.asarray, args)), shapes, q, k, v, lengths, q_offsets, k_offsets, *rest
        )
        return found if self.backward or options["is_training"] else found[:1]


@pytest.fixture
def twin_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention_cudnn._kernels()
    assert real is not None
    kernels = ModuleType("twin")
    vars(kernels).update(MaskType=real.MaskType, AttentionLayout=real.AttentionLayout)
    vars(kernels).update(
        _dot_product_attention_fwd_p=TwinPrimitive(False), _dot_product_attention_bwd_p=TwinPrimitive(True)
    )
    monkeypatch.setattr(attention_cudnn, "_kernels", lambda: kernels)


def test_bounds_of_random_rows_are_numpys() -> None:
    random = np.random.default_rng(0)
    rows = [[], [T], [1] * T, [T - 1], [T - 1, 1]]
    for _ in range(200):
        cuts = np.sort(random.choice(np.arange(1, T + 1), random.integers(1, 9), replace=False))
        rows.append(np.diff(cuts, prepend=0).tolist())
    segments, _ = packed(rows)
    lengths, offsets = (np.asarray(x) for x in jax.jit(record_bounds, static_argnums=1)(segments, T))
    assert lengths.dtype == offsets.dtype == np.int32
    for row, segment_T in enumerate(segments):
        for number in range(1, T + 1):
            where = np.flatnonzero(segment_T == number)
            assert lengths[row, number - 1] == where.size
            assert offsets[row, number - 1] == (where[0] if where.size else (segment_T > 0).sum())


def test_records_beyond_the_most_are_left_out_of_the_bounds() -> None:
    lengths, offsets = record_bounds(jnp.asarray(ROWS[0]), 2)
    np.testing.assert_array_equal(lengths, [[7, 1], [24, 0], [5, 4]])
    np.testing.assert_array_equal(offsets, [[0, 7], [0, 24], [0, 5]])


@pytest.mark.usefixtures("twin_kernels")
@pytest.mark.parametrize(
    ("rows", "window"), [(ROWS, None), (packed([[], [8], [1] * M]), 3)], ids=["full", "an empty row, window"]
)
def test_values_and_gradients_are_those_of_the_definition(rows: Rows, window: int | None) -> None:
    *qkv, weight = drawn()
    real = (rows[0] > 0)[:, :, None, None]

    def run(kernel: partial[jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def weighed(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = kernel(*qkv, (rows, rows), window=window)
            return jnp.sum(jnp.where(real, out * weight, 0)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(weighed, (0, 1, 2), has_aux=True))(*qkv)
        return out, gradients

    wanted, wanted_gradients = run(partial(attend))
    got, gradients = run(partial(attend_cudnn, max_segments=M))
    np.testing.assert_allclose(got, np.where(real, wanted, 0), atol=1e-5)
    for name, gradient, wanted_gradient in zip("qkv", gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted_gradient, atol=2e-5, err_msg=name)
    alone = jax.jit(partial(attend_cudnn, window=window, max_segments=M))(*qkv, (rows, rows))  # without statistics
    np.testing.assert_allclose(alone, got, atol=1e-6)


@pytest.mark.usefixtures("twin_kernels")
def test_a_nan_cotangent_at_padding_stays_there() -> None:
    rows = packed([[5, 4], [3], [24]])
    *qkv, _ = drawn()
    cotangent = np.where((rows[0] > 0)[:, :, None, None], np.ones_like(qkv[0]), np.nan)

    @jax.jit
    def pull(*qkv: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, back = jax.vjp(lambda *qkv: attend_cudnn(*qkv, (rows, rows), window=None, max_segments=M), *qkv)
        return out, back(cotangent)

    for result in jax.tree.leaves(pull(*qkv)):
        assert np.isfinite(result).all()


@pytest.mark.usefixtures("twin_kernels")
@pytest.mark.parametrize("most", [1, 4])
def test_a_row_with_too_many_records_is_nan(most: int) -> None:
    *qkv, _ = drawn()
    got = jax.jit(partial(attend_cudnn, window=None, max_segments=most))(*qkv, (ROWS, ROWS))
    wanted = jax.jit(attend)(*qkv, (ROWS, ROWS))
    for row, records in enumerate([4, 1, 5]):
        if records > most:
            assert np.isnan(got[row]).all()
        else:
            real = ROWS[0][row] > 0
            np.testing.assert_allclose(got[row, real], wanted[row, real], atol=1e-5)


def test_the_step_lowers_to_one_kernel_each_way() -> None:
    places = jax.ShapeDtypeStruct((B, T), jnp.int32)
    qkv = [jax.ShapeDtypeStruct((B, T, heads, 64), jnp.bfloat16) for heads in (N, K, K)]

    def total(q: jax.Array, k: jax.Array, v: jax.Array, s: jax.Array, p: jax.Array) -> jax.Array:
        remat = jax.checkpoint(
            partial(attend_cudnn, window=9, max_segments=M),
            policy=jax.checkpoint_policies.save_only_these_names("attention"),
        )
        return jnp.sum(remat(q, k, v, ((s, p), (s, p))).astype(jnp.float32))

    lowered = jax.jit(jax.grad(total, (0, 1, 2))).trace(*qkv, places, places).lower(lowering_platforms=("cuda",))
    text = lowered.as_text().replace("\\22", '"')
    assert re.findall(r"custom_call @(__cudnn\S+?)\(", text) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for setting in ('"mask_type": "PADDING_CAUSAL"', '"sliding_window_length": 9', '"max_seg_per_batch": 5'):
        assert text.count(setting) == 2, setting
    assert text.count('"fmha_scale": 0.125') == 2


def test_what_cannot_be_known_or_addressed_is_an_error() -> None:
    x = jax.ShapeDtypeStruct((1, 8, 2, 8), jnp.bfloat16)
    places = ((jax.ShapeDtypeStruct((1, 8), jnp.int32),) * 2,) * 2
    with pytest.raises(UserError, match="set max_segments"):
        jax.eval_shape(partial(attend_cudnn, window=None, max_segments=0), x, x, x, places)
    x = jax.ShapeDtypeStruct((2**16, 8, 32, 128), jnp.bfloat16)
    with pytest.raises(UserError, match="2\\^31 elements; take smaller micro-batches"):
        jax.eval_shape(partial(attend_cudnn, window=None, max_segments=2), x, x, x, places)


H200 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
BFLOAT16 = replace(get_preset("llama3_8b"), compute=Compute(dtype="bfloat16"))


def test_hopper_with_bfloat16_can() -> None:
    assert why_not_cudnn(BFLOAT16, H200) is None
    assert why_not_cudnn(BFLOAT16, SimpleNamespace(platform="cuda")) is None  # a topology's device says no more


@pytest.mark.parametrize(
    ("config", "device", "reason"),
    [
        (BFLOAT16, jax.devices()[0], "runs on NVIDIA GPUs, the devices are cpu"),
        (BFLOAT16, SimpleNamespace(platform="gpu", compute_capability="8.0"), "9.0 .Hopper., the devices have 8.0"),
        (BFLOAT16, SimpleNamespace(platform="gpu", compute_capability="gfx942"), "NVIDIA GPUs, the devices are gfx942"),
        (replace(BFLOAT16, compute=Compute()), H200, "bfloat16 or float16, not float32"),
        (replace(BFLOAT16, head_dim=100), H200, "multiple of 8 and at most 256, got 100"),
        (replace(BFLOAT16, head_dim=264), H200, "multiple of 8 and at most 256, got 264"),
        (replace(BFLOAT16, compute=Compute(dtype="bfloat16", forget=0.1)), H200, "hide single tokens"),
    ],
)
def test_what_cannot_says_why(config: object, device: object, reason: str) -> None:
    assert re.search(reason, str(why_not_cudnn(config, device)))


def test_another_jax_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.cudnn import fused_attention_stablehlo as theirs

    monkeypatch.setattr(theirs, "_dot_product_attention_fwd_abstract", lambda query, key: None)
    assert "does not have the private functions" in str(why_not_cudnn(BFLOAT16, H200))
    with pytest.raises(UserError, match="private functions"):
        jax.eval_shape(partial(attend_cudnn, window=None, max_segments=M), *drawn()[:3], (ROWS, ROWS))
