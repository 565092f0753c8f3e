"""Attention against torch's, record by record: grouped heads, packed rows, caches with empty slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from easylm_like.model.attention import attend

B, T, H = 2, 12, 8
# A row of three records, and one of two with padding.
SEGMENTS = np.array([[1] * 3 + [2] * 4 + [3] * 5, [1] * 5 + [2] * 4 + [0] * 3], np.int32)
POSITIONS = np.array([[*range(3), *range(4), *range(5)], [*range(5), *range(4), 0, 0, 0]], np.int32)
attention = jax.jit(attend)


def drawn(heads: int, length: int = T, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([heads, length, seed]).normal(size=(B, length, heads, H)).astype(np.float32)


def torchs(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, causal: bool = True) -> np.ndarray:
    """Return torch's attention over one record, [T, N, H]."""
    q, k, v = (torch.tensor(x).transpose(0, 1) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(0, 1).numpy()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_packed_records_attend_as_torch_attends_over_each(heads: int, kv_heads: int) -> None:
    q, k, v = drawn(heads), drawn(kv_heads, seed=1), drawn(kv_heads, seed=2)
    got = np.asarray(attention(q, k, v, ((SEGMENTS, POSITIONS), (SEGMENTS, POSITIONS))))
    assert got.shape == (B, T, heads, H)
    for row in range(B):
        for segment in range(1, SEGMENTS[row].max() + 1):
            own = SEGMENTS[row] == segment
            wanted = torchs(q[row, own], k[row, own], v[row, own])
            np.testing.assert_allclose(got[row, own], wanted, atol=1e-5, err_msg=f"row {row}, record {segment}")


def test_other_records_and_later_tokens_have_no_influence() -> None:
    q, k, v = drawn(4), drawn(2, seed=1), drawn(2, seed=2)
    places = ((SEGMENTS, POSITIONS), (SEGMENTS, POSITIONS))
    before = np.asarray(attention(q, k, v, places))
    seen = [4, 5]  # record 2 of row 0 lies at 3..6; its query at 5 sees 3, 4 and 5
    unseen = [0, 2, 6, 7, 11]
    for at, changes in [(at, True) for at in seen] + [(at, False) for at in unseen]:
        other_k, other_v = k.copy(), v.copy()
        other_k[0, at] += 1.0
        other_v[0, at] -= 1.0
        after = np.asarray(attention(q, other_k, other_v, places))
        assert np.array_equal(after[0, 5], before[0, 5]) != changes, at


def test_a_query_at_padding_gives_numbers() -> None:
    q, k, v = drawn(4), drawn(2, seed=1), drawn(2, seed=2)
    nobody = np.full((B, T), 9, np.int32)  # a segment that no key has

    def total(q: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v, ((nobody, POSITIONS), (SEGMENTS, POSITIONS))))

    value, gradient = jax.jit(jax.value_and_grad(total))(q)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_empty_slots_of_a_cache_are_not_seen() -> None:
    """One query a row, as in decoding: the answers lie after the longest prompt, the positions go on from the own."""
    slots = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 0]], np.int32)  # 4 and 2 ids of prompt, 1 of answer
    places = np.array([[0, 1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 2, 0, 0]], np.int32)
    q, k, v = drawn(4, 1), drawn(2, 7, seed=1), drawn(2, 7, seed=2)
    query = (np.ones((B, 1), np.int32), np.array([[4], [2]], np.int32))
    got = attention(q, k, v, (query, (slots, places)))
    for row in range(B):
        own = slots[row] == 1
        wanted = torchs(q[row], k[row, own], v[row, own], causal=False)
        np.testing.assert_allclose(got[row], wanted, atol=1e-5)


def test_bfloat16_keeps_its_scores_in_float32() -> None:
    """Two scores of 35.36 and 35.44, between which bfloat16 has no number."""
    q = jnp.zeros((1, 1, 1, H), jnp.bfloat16).at[..., :2].set(jnp.array([10, 1], jnp.bfloat16))
    k = jnp.zeros((1, 2, 1, H), jnp.bfloat16).at[0, :, 0, :2].set(jnp.array([[10, 0], [10, 0.25]], jnp.bfloat16))
    v = jnp.ones((1, 2, 1, H), jnp.bfloat16).at[0, 0].set(-1.0)
    ones = jnp.ones((1, 2), jnp.int32)
    got = attention(q, k, v, ((ones[:, :1], ones[:, :1]), (ones, ones)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), np.tanh(0.25 / np.sqrt(H) / 2), atol=0.01)
