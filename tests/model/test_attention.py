"""Attention of every backend that runs here against torch's, record by record: values and gradients."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from easylm_like.model import attention_chunked
from easylm_like.model.attention import Places, attend
from easylm_like.model.config import Attention
from easylm_like.model.partition import MeshConfig, make_mesh

H = 8
BACKENDS = [Attention.XLA, Attention.CHUNKED]
SHORT = [(3, 4, 5), (5, 4)]  # the records of each row; what is left is padding
ODD = [(40, 30), (75,), ()]  # the same shape where the case does not matter: it is compiled once
Arrays = tuple[np.ndarray, ...]
attention = jax.jit(attend, static_argnames=("window", "backend"))


def packed(rows: list[tuple[int, ...]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return segments and positions, int32 [B, length], of rows with records of these lengths."""
    segments, positions = np.zeros((2, len(rows), length), np.int32)
    for row, lengths in enumerate(rows):
        ends = np.cumsum(lengths)
        for segment, (end, size) in enumerate(zip(ends, lengths, strict=True), start=1):
            segments[row, end - size : end], positions[row, end - size : end] = segment, np.arange(size)
    return segments, positions


def drawn(rows: int, length: int, heads: int, kv_heads: int) -> Arrays:
    """Return q, k, v and weights of the sum whose gradient is taken."""
    random = np.random.default_rng([rows, length, heads, kv_heads])
    sizes = (heads, kv_heads, kv_heads, heads)
    return tuple(random.normal(size=(rows, length, size, H)).astype(np.float32) for size in sizes)


@partial(jax.jit, static_argnames=("window", "backend"))
def compiled(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weights: jax.Array,
    places: tuple[Places, Places],
    window: int | None,
    backend: Attention,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v, places, window=window, backend=backend)
        return jnp.sum(jnp.where(places[0][0][..., None, None] > 0, out * weights, 0)), out

    return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)


def ours(
    arrays: Arrays,
    places: tuple[np.ndarray, np.ndarray],
    k_segments: np.ndarray,
    backend: Attention,
    window: int | None = None,
) -> Arrays:
    """Return what `attend` returns and its gradients with respect to q, k and v; weights at padding are 0."""
    gradients, out = compiled(*arrays, (places, (k_segments, places[1])), window, backend)
    return tuple(np.asarray(array, np.float32) for array in (out, *gradients))


def attend_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Return torch's attention of [T, heads, H]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)
    return out[0].transpose(0, 1)


def torchs(arrays: Arrays, q_places: Arrays, k_segments: np.ndarray, window: int | None = None) -> Arrays:
    """Return the same from torch in float64, one record at a time; 0 at padding."""
    q, k, v = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays[:3])
    out = torch.zeros_like(q).detach()
    for row, segments in enumerate(q_places[0]):
        for segment in range(1, segments.max() + 1):
            own = np.flatnonzero(segments == segment)
            back = own[:, None] - own[None]
            visible = (back >= 0) & (k_segments[row, own] == segment)
            if window is not None:
                visible &= back < window
            result = attend_all(q[row, own], k[row, own], v[row, own], torch.tensor(visible))
            out = out.index_put((torch.tensor(row), torch.tensor(own)), result)
    (out * torch.tensor(arrays[3])).sum().backward()
    return tuple(array.detach().numpy() for array in (out, q.grad, k.grad, v.grad))


def assert_close(got: Arrays, wanted: Arrays, real: np.ndarray, atol: float = 2e-5) -> None:
    """Compare the result at real tokens, and the gradients everywhere: those at padding are 0."""
    for name, array, other in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        assert np.isfinite(array).all(), name
        where = real if name == "out" else np.ones_like(real)
        np.testing.assert_allclose(array[where], other[where], atol=atol, rtol=atol, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "length", "heads", "window"),
    [
        pytest.param(SHORT, 12, (4, 4), None, id="every head its own keys"),
        pytest.param(SHORT, 12, (4, 2), 3, id="grouped heads, a window within records"),
        pytest.param([(17, 1, 20), (), (50,)], 50, (6, 1), None, id="one key head, a row of padding"),
        pytest.param([(122, 70), (3,) * 60], 192, (2, 1), 64, id="whole blocks, a window, many short records"),
        pytest.param([(300,), (1, 129, 127, 40)], 300, (2, 1), None, id="one long record"),
        pytest.param([(300,), (140, 150)], 300, (1, 1), 130, id="a long window"),
        pytest.param([(9,)], 12, (1, 1), 100, id="a window longer than the row"),
    ],
)
def test_packed_records_attend_as_torch_attends_over_each(
    rows: list[tuple[int, ...]], length: int, heads: tuple[int, int], window: int | None, backend: Attention
) -> None:
    places, arrays = packed(rows, length), drawn(len(rows), length, *heads)
    wanted = torchs(arrays, places, places[0], window)
    assert_close(ours(arrays, places, places[0], backend, window), wanted, places[0] > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forgotten_keys_are_seen_by_nobody(backend: Attention) -> None:
    places, arrays = packed(ODD, 80), drawn(3, 80, 2, 1)
    gone = (np.random.default_rng(0).random(places[0].shape) < 0.4) & (places[1] > 0)
    k_segments = np.where(gone, -1, places[0]).astype(np.int32)
    got = ours(arrays, places, k_segments, backend)
    assert_close(got, torchs(arrays, places, k_segments), places[0] > 0)
    assert not got[2][gone].any()
    assert not got[3][gone].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 2])
def test_other_records_and_later_tokens_have_no_influence(window: int | None, backend: Attention) -> None:
    segments, positions = packed(SHORT, 12)
    q, k, v, _ = drawn(2, 12, 4, 2)
    run = partial(attention, window=window, backend=backend)
    before = np.asarray(run(q, k, v, ((segments, positions),) * 2))
    seen = {3, 4, 5} if window is None else {4, 5}  # record 2 of row 0 lies at 3..6; the query is the one at 5
    for at in range(12):
        other_k, other_v = k.copy(), v.copy()
        other_k[0, at] += 1.0
        other_v[0, at] -= 1.0
        after = np.asarray(run(q, other_k, other_v, ((segments, positions),) * 2))
        assert np.array_equal(after[0, 5], before[0, 5]) == (at not in seen), at


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_float32_rounded(backend: Attention) -> None:
    places = packed([(40, 30), (75,)], 80)
    halves = tuple(np.asarray(jnp.asarray(a, jnp.bfloat16)) for a in drawn(2, 80, 4, 2))
    got = ours(halves, places, places[0], backend)
    wide = tuple(array.astype(np.float32) for array in halves)
    assert_close(got, torchs(wide, places, places[0]), places[0] > 0, atol=0.05)
    shape = jax.eval_shape(partial(attend, backend=backend), *map(jnp.asarray, halves[:3]), (places, places))
    assert shape.dtype == jnp.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_keeps_its_scores_in_float32(backend: Attention) -> None:
    """Two scores of 35.36 and 35.44, between which bfloat16 has no number; the query is the second of two tokens."""
    q = jnp.zeros((1, 2, 1, H), jnp.bfloat16).at[..., :2].set(jnp.array([10, 1], jnp.bfloat16))
    k = jnp.zeros((1, 2, 1, H), jnp.bfloat16).at[0, :, 0, :2].set(jnp.array([[10, 0], [10, 0.25]], jnp.bfloat16))
    v = jnp.ones((1, 2, 1, H), jnp.bfloat16).at[0, 0].set(-1.0)
    places = (np.ones((1, 2), np.int32), np.arange(2, dtype=np.int32)[None])
    got = attention(q, k, v, (places, places), backend=backend)
    np.testing.assert_allclose(got[0, 1].astype(jnp.float32), np.tanh(0.25 / np.sqrt(H) / 2), atol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_stay_numbers(backend: Attention) -> None:
    places, (q, k, v, weights) = packed(ODD, 80), drawn(3, 80, 2, 1)
    arrays = (100 * q, 100 * k, v, weights)
    got, wanted = ours(arrays, places, places[0], backend), torchs(arrays, places, places[0])
    assert all(np.isfinite(array).all() for array in got)
    real = places[0] > 0
    np.testing.assert_allclose(got[0][real], wanted[0][real], atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_values_at_padding_reach_no_real_token(backend: Attention) -> None:
    """1e9 at padding against the same with ordinary numbers: a weight of exactly 0 times anything finite is 0."""
    places, arrays = packed(ODD, 80), drawn(3, 80, 2, 1)
    padding = places[0] == 0
    before = ours(arrays, places, places[0], backend)
    wild = tuple(np.where(padding[..., None, None], np.float32(1e9), a) for a in arrays[:3])
    after = ours((*wild, arrays[3]), places, places[0], backend)
    for name, array, other in zip(("out", "dq", "dk", "dv"), after, before, strict=True):
        np.testing.assert_array_equal(array[~padding], other[~padding], err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_gives_numbers(backend: Attention) -> None:
    """Every key of row 0 is hidden."""
    places, arrays = packed(ODD, 80), drawn(3, 80, 2, 1)
    k_segments = places[0].copy()
    k_segments[0] = -1
    assert all(np.isfinite(array).all() for array in ours(arrays, places, k_segments, backend))


def test_empty_slots_of_a_cache_are_not_seen() -> None:
    """One query a row, as in decoding: the answers lie after the longest prompt, the positions go on from the own."""
    slots = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 0]], np.int32)  # 4 and 2 ids of prompt, 1 of answer
    places = np.array([[0, 1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 2, 0, 0]], np.int32)
    q, k, v = drawn(2, 1, 4, 2)[0], *drawn(2, 7, 4, 2)[1:3]
    query = (np.ones((2, 1), np.int32), np.array([[4], [2]], np.int32))
    got = attention(q, k, v, (query, (slots, places)))
    for row in range(2):
        own = slots[row] == 1
        wanted = attend_all(torch.tensor(q[row]), torch.tensor(k[row, own]), torch.tensor(v[row, own]), None)
        np.testing.assert_allclose(got[row], wanted, atol=1e-5)


def largest(function: Callable[..., object], *arguments: object) -> int:
    """Return the number of elements of the largest array that is made on the way."""

    def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
        for equation in jaxpr.eqns:
            yield equation
            for leaf in jax.tree.leaves(equation.params, is_leaf=lambda value: isinstance(value, Jaxpr | ClosedJaxpr)):
                if isinstance(leaf, Jaxpr | ClosedJaxpr):
                    yield from equations(leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf)

    made = equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    return max(getattr(v.aval, "size", 0) for equation in made for v in equation.outvars)


@pytest.mark.parametrize("length", [1024, 1000])
def test_chunked_attention_never_holds_all_scores(length: int) -> None:
    places, arrays = packed([(length // 2, length // 2)], length), drawn(1, length, 1, 1)

    def gradient(backend: Attention) -> Callable[..., object]:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(attend(q, k, v, jax.tree.map(jnp.asarray, (places, places)), backend=backend))

        return jax.grad(total, argnums=(0, 1, 2))

    assert largest(gradient(Attention.XLA), *arrays[:3]) == length**2
    assert largest(gradient(Attention.CHUNKED), *arrays[:3]) < length**2 / 3


ACROSS = [(100, 140, 8), (5,) * 20, ()]  # records over the borders of pieces, pieces of padding, a row of it


@pytest.mark.parametrize(
    ("sizes", "length", "heads", "window", "platform"),
    [
        pytest.param((4, 2, 1), 288, (2, 1), None, "cpu", id="two pieces of 144"),
        pytest.param((2, 4, 1), 288, (2, 2), 30, "cpu", id="four of 72, a window over the borders"),
        pytest.param((2, 2, 2), 320, (4, 2), 90, "cpu", id="two of 160 for each half of the heads, a window"),
        pytest.param((1, 4, 2), 256, (6, 2), None, "cpu", id="four of one block for each half of the heads"),
        pytest.param((1, 8, 1), 264, (1, 1), 70, "cpu", id="eight of 33"),
        pytest.param((2, 4, 1), 1100, (2, 1), 90, "gpu", id="four of 275, all rows of a device at once"),
    ],
)
def test_pieces_of_rows_on_other_devices_attend_as_torch_attends_over_each_record(
    sizes: tuple[int, int, int],
    length: int,
    heads: tuple[int, int],
    window: int | None,
    platform: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With three keys of ten forgotten; a query is left at least one."""
    monkeypatch.setattr(attention_chunked, "on_cpu", lambda: platform == "cpu")  # how the blocks are cut depends on it
    places, arrays = packed([*ACROSS, (length,)], length), drawn(4, length, *heads)
    hidden = (np.random.default_rng(0).random(places[0].shape) < 0.3) & (places[1] % (window or length) > 0)
    k_segments = np.where(hidden & (places[0] > 0), -1, places[0]).astype(np.int32)
    fsdp, sequence, tensor = sizes
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=fsdp, sequence=sequence, tensor=tensor))):
        got = ours(arrays, places, k_segments, Attention.CHUNKED, window)
    assert_close(got, torchs(arrays, places, k_segments, window), places[0] > 0)
