"""Every relative of LLaMA, read in chunks and then token by token, beside transformers on the same weights."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from easylm_like.hf.keys import LLAMA_KEYS
from easylm_like.serve.forward import decode, empty_cache, extract_layer, insert_layer, prefill
from easylm_like.serve.weights import Weights, dot, logits

from ..model.conftest import SHAPES, Twins, twins  # noqa: F401  a fixture

LENGTHS = (1, 9, 20)  # of three prompts; 12 more tokens of each follow
MORE = 12


def weights_of(twins_: Twins) -> Weights:
    """Return the weights as transformers has them: one [out, in] matrix a layer."""
    theirs = {name: jnp.asarray(tensor.numpy()) for name, tensor in twins_.theirs.state_dict().items()}
    config, rows = twins_.config, twins_.config.padded_vocab - twins_.config.vocab_size
    pad = partial(jnp.pad, pad_width=((0, rows), (0, 0)))
    layers = tuple(
        {key.ours: theirs[name] for key in LLAMA_KEYS if key.stacked and (name := key.theirs.format(i)) in theirs}
        for i in range(config.n_layers)
    )
    head = theirs["model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
    return Weights(pad(theirs["model.embed_tokens.weight"]), layers, theirs["model.norm.weight"], pad(head))


@pytest.mark.parametrize(
    ("name", "rows", "scatter"),
    [*((name, rows, False) for name in SHAPES for rows in (1, 3)), ("gqa", 3, True), ("mistral", 3, True)],
)
def test_logits_are_those_of_transformers(
    twins: Callable[[str], Twins],  # noqa: F811
    name: str,
    rows: int,
    scatter: bool,
) -> None:
    pair = twins(name)
    config, weights = pair.config, weights_of(pair)
    random = np.random.default_rng(0)
    texts = [random.integers(0, config.vocab_size, length + MORE).astype(np.int32) for length in LENGTHS[-rows:]]
    with torch.no_grad():
        wanted = [pair.theirs(torch.tensor(text[None], dtype=torch.long)).logits[0].numpy() for text in texts]
    read, step = jax.jit(partial(prefill, config)), jax.jit(partial(decode, config, scatter=scatter))
    cache = empty_cache(config, rows, 40, "float32")
    for at, (text, length) in enumerate(zip(texts, LENGTHS[-rows:], strict=True)):
        row = empty_cache(config, 1, 32, "float32")
        for start in range(0, length, 8):  # chunks of 8, the last one filled up with what is not part of the text
            chunk = np.full(8, 5, np.int32)
            chunk[: min(8, length - start)] = text[start : min(start + 8, length)]
            x_TD, row = read(weights, row, chunk, start)
            found = logits(config, weights, x_TD)[: length - start]
            np.testing.assert_allclose(found, wanted[at][start : start + 8][: length - start], atol=2e-4)
        layers = [
            insert_layer(pair, part, at)
            for pair, part in zip(zip(cache.k, cache.v, strict=True), zip(row.k, row.v, strict=True), strict=True)
        ]
        cache = type(cache)(*map(tuple, zip(*layers, strict=True)))
    lengths = jnp.array(LENGTHS[-rows:], jnp.int32)
    for more in range(MORE):
        tokens = jnp.array([text[length + more] for text, length in zip(texts, LENGTHS[-rows:], strict=True)])
        found, lengths, cache = step(weights, cache, tokens, lengths)
        for at, length in enumerate(LENGTHS[-rows:]):
            np.testing.assert_allclose(found[at], wanted[at][length + more], atol=2e-4)
    assert lengths.tolist() == [length + MORE for length in LENGTHS[-rows:]]


def test_a_row_comes_back_out_of_a_cache_shorter_or_longer() -> None:
    random = np.random.default_rng(0)
    cache = random.normal(size=(3, 2, 4, 10)), random.normal(size=(3, 2, 10, 4))
    k, v = extract_layer((jnp.asarray(cache[0]), jnp.asarray(cache[1])), jnp.int32(1), 6)
    np.testing.assert_array_equal(k, np.float32(cache[0][1:2, :, :, :6]))
    np.testing.assert_array_equal(v, np.float32(cache[1][1:2, :, :6]))
    k, v = extract_layer((jnp.asarray(cache[0]), jnp.asarray(cache[1])), jnp.int32(2), 12)
    np.testing.assert_array_equal(k, np.float32(np.pad(cache[0][2:], ((0, 0), (0, 0), (0, 0), (0, 2)))))
    np.testing.assert_array_equal(v, np.float32(np.pad(cache[1][2:], ((0, 0), (0, 0), (0, 2), (0, 0)))))


def test_an_int8_matrix_is_its_rows_to_a_127th_of_their_largest() -> None:
    from easylm_like.model.partition import MeshConfig, make_mesh
    from easylm_like.serve.weights import _quantise

    random = np.random.default_rng(0)
    matrix = (random.normal(size=(6, 40)) * 10.0 ** np.arange(-4, 2)[:, None]).astype(np.float32)
    matrix[3] = 0
    narrow = _quantise(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), "q", matrix)
    back = np.asarray(narrow.values, np.float32) * np.asarray(narrow.scale)[:, None]
    assert (np.abs(back - matrix) <= np.abs(matrix).max(axis=1, keepdims=True) / 254 * 1.001).all()
    x = random.normal(size=(2, 40)).astype(np.float32)
    np.testing.assert_allclose(dot(narrow, jnp.asarray(x)), x @ back.T, rtol=1e-4, atol=1e-5)
