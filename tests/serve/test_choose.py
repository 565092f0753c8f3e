"""What may be drawn, against transformers' own processors; how often, against the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from easylm_like.serve.choose import _keep, draw, gather_settings, logprobs
from easylm_like.serve.request import Sampling

V = 1000
SETTINGS = [
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.3, top_p=0.9),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=0.9, top_k=50, top_p=0.5),
    Sampling(temperature=2.0, top_k=200, top_p=0.95, min_p=0.02),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=V + 5),
    Sampling(temperature=1.0),
]


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    random = np.random.default_rng(0)
    return (random.normal(0, 3, (len(SETTINGS), V))).astype(np.float32)


def kept_by_transformers(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    scores = torch.tensor(logits_V)[None]
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for warper in warpers:
        scores = warper(torch.zeros((1, 1), dtype=torch.long), scores)
    return np.isfinite(scores[0].numpy())


def test_the_tokens_that_may_be_drawn_are_those_of_transformers(logits: np.ndarray) -> None:
    settings = gather_settings(SETTINGS)
    kept = np.asarray(jax.jit(_keep)(jnp.asarray(logits) / settings.temperature[:, None], settings))
    for row, sampling in enumerate(SETTINGS):
        np.testing.assert_array_equal(kept[row], kept_by_transformers(logits[row], sampling), err_msg=str(sampling))
    assert kept.sum(axis=1)[[0, 5, 6, 7, 8]].tolist() == [5, 1, 1, V, V]


def test_tokens_that_are_equally_likely_at_the_cut_all_stay() -> None:
    logits = np.array([[3.0, 1.0, 1.0, 1.0, -2.0, 0.0, -0.0, -np.inf]], np.float32)
    kept = _keep(jnp.asarray(logits), gather_settings([Sampling(temperature=1, top_k=2)]))
    assert np.asarray(kept)[0].tolist() == [True, True, True, True, False, False, False, False]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    number, size = 20_000, 300  # more than two blocks of the cumulative sum
    logits = np.random.default_rng(1).normal(0, 2, size).astype(np.float32)
    logits[[0, 128, 299]] = -np.inf
    settings = gather_settings([Sampling(temperature=1.0, seed=seed) for seed in range(number)])
    tokens = np.asarray(jax.jit(draw)(jnp.tile(logits, (number, 1)), settings, jnp.full(number, 7)))
    p = np.exp(logits - logits.max())
    p /= p.sum()
    counts = np.bincount(tokens, minlength=size)
    assert counts[p == 0].tolist() == [0, 0, 0]
    expected = number * p[p > 0]
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi_square < size - 4 + 5 * np.sqrt(2 * size)  # mean and five standard deviations


def test_a_draw_depends_on_seed_and_place_alone() -> None:
    logits = np.random.default_rng(2).normal(0, 1, V).astype(np.float32)

    def tokens(rows: list[tuple[int, int]]) -> list[int]:
        settings = gather_settings([Sampling(temperature=1.0, seed=seed) for seed, _ in rows])
        places = jnp.array([place for _, place in rows])
        return np.asarray(draw(jnp.tile(logits, (len(rows), 1)), settings, places)).tolist()

    rows = [(seed, place) for seed in (0, 1, 2**40, 2**63, -1) for place in (1, 2, 500)]
    together = tokens(rows)
    assert together == [tokens([row])[0] for row in rows]
    assert len(set(together)) > 10


@pytest.mark.parametrize("temperature", [1e-37, 1e-20, 1e-9, 1e-4])
def test_a_tiny_temperature_is_greedy(logits: np.ndarray, temperature: float) -> None:
    rows = gather_settings([Sampling(temperature=temperature, seed=seed) for seed in range(len(SETTINGS))])
    tokens = np.asarray(jax.jit(draw)(jnp.asarray(logits), rows, jnp.zeros(len(SETTINGS), jnp.int32)))
    assert tokens.tolist() == logits.argmax(axis=1).tolist()


def test_zero_temperature_is_greedy_beside_rows_that_are_drawn(logits: np.ndarray) -> None:
    rows = [Sampling(temperature=0.0, seed=3) if n % 2 else SETTINGS[n] for n in range(len(SETTINGS))]
    tokens = np.asarray(draw(jnp.asarray(logits), gather_settings(rows), jnp.zeros(len(rows), jnp.int32)))
    assert tokens[1::2].tolist() == logits.argmax(axis=1)[1::2].tolist()


def test_log_probabilities_are_those_of_the_softmax(logits: np.ndarray) -> None:
    tokens = np.arange(len(logits), dtype=np.int32)
    own, top, ids = (np.asarray(part) for part in logprobs(jnp.asarray(logits), tokens))
    wanted = torch.log_softmax(torch.tensor(logits), -1).numpy()
    np.testing.assert_allclose(own, wanted[tokens, tokens], atol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-wanted, axis=1, kind="stable")[:, :20])
    np.testing.assert_allclose(top, -np.sort(-wanted, axis=1)[:, :20], atol=1e-5)
