"""Every member of the family is the model that transformers computes: layer by layer, and packed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from easylm_like.model.config import Compute, LlamaConfig
from easylm_like.model.llama import Params, abstract_model

from .conftest import GQA, SHAPES, Packed, Twins

TOKENS = np.random.default_rng(0).integers(0, GQA.vocab_size, (2, 50), dtype=np.int32)


@partial(jax.jit, static_argnums=0)
def run(config: LlamaConfig, params: Params) -> tuple[jax.Array, jax.Array]:
    """Return (x after the last norm, logits) of TOKENS, two rows of one record each."""
    model = nnx.merge(abstract_model(config)[0], params)
    places = jnp.ones_like(TOKENS), jnp.broadcast_to(jnp.arange(50), TOKENS.shape)
    x_BTD, _ = model(jnp.asarray(TOKENS), places)
    return x_BTD, model.logits(x_BTD)


def first_layers(params: Params, count: int) -> Params:
    """Return weights with which all layers after the first `count` add nothing to the stream."""
    return params | {name: params[name].at[count:].set(0.0) for name in ("o", "down")}


UNROLLED = ("llama3 rope", "mistral", "qwen2", "qwen3", "smollm2")


@pytest.mark.parametrize(("name", "scan"), [*product(SHAPES, [True]), *product(UNROLLED, [False])])
def test_every_layer_and_the_logits_are_those_of_transformers(
    twins: Callable[[str], Twins], name: str, scan: bool
) -> None:
    both = twins(name)
    config = replace(both.config, compute=Compute(scan_layers=scan))
    with torch.no_grad():
        theirs = both.theirs(torch.tensor(TOKENS, dtype=torch.long), output_hidden_states=True)
        # theirs are what each layer adds up to, only the last one is normed; ours come normed
        stages = [*map(both.theirs.model.norm, theirs.hidden_states[:-1]), theirs.hidden_states[-1]]
    assert len(stages) == config.n_layers + 1
    for count, wanted in enumerate(stages):
        got, logits = run(config, first_layers(both.params, count))
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4, err_msg=f"after {count} layers")
    assert logits.shape[-1] == config.vocab_size < config.padded_vocab
    assert theirs.logits.std() > 0.5, "logits near zero would prove nothing"
    np.testing.assert_allclose(logits, theirs.logits.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen2, tied, with a window", "qwen3"])
def test_packed_records_have_the_logits_of_each_alone(
    twins: Callable[[str], Twins], forward: Callable[..., jax.Array], packed: Packed, name: str
) -> None:
    both = twins(name)
    got = forward(both.config, both.params, packed.tokens, packed.segments, packed.positions)
    assert np.isfinite(got).all()
    for row, where in packed.places:
        with torch.no_grad():
            alone = both.theirs(torch.tensor(packed.tokens[row : row + 1, where])).logits[0].numpy()
        np.testing.assert_allclose(got[row, where], alone, atol=1e-4, err_msg=f"{row} {where}")


@pytest.mark.parametrize(
    ("name", "off"),
    [("mistral", {"sliding_window": 8}), ("qwen2", {"qkv_bias": False}), ("qwen3", {"qk_norm": False})],
)
def test_every_switch_changes_the_logits(twins: Callable[[str], Twins], name: str, off: dict[str, object]) -> None:
    both = twins(name)
    other = replace(both.config, **off)
    params = {weight: both.params[weight] for weight in abstract_model(other)[1]}
    difference = np.abs(run(other, params)[1] - run(both.config, both.params)[1])
    assert difference[:, :7].max() == 0 or name != "mistral", "within the window nothing changes"
    assert difference[:, 7:].max() > 0.1
