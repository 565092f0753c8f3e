"""What the tests of conversion share: small random models as runs, and the folders made of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easylm_like.convert.__main__ import convert_to_hf
from easylm_like.data.tokenizer import Tokenizer, train_sentencepiece
from easylm_like.model.config import LlamaConfig, RopeScaling
from easylm_like.model.llama import abstract_model
from easylm_like.train.checkpoint import save_params, shape_to_json

TEXTS = [
    "BEGINNING OF CONVERSATION: USER: What is the capital of France? GPT: The capital of France is Paris.",
    "An Unhelpful Answer: naïve café, two  spaces",
    *(f"{a} and {b} make {a + b}" for a in range(9) for b in range(9)),
]
# The wavelengths of both are told apart within a few tokens, so that a lost theta or scaling shows.
SHAPES = {
    "grouped": LlamaConfig(
        vocab_size=384, d_model=24, d_ff=40, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, rope_theta=500.0
    ),
    "tied": LlamaConfig(
        vocab_size=400,
        d_model=16,
        d_ff=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        head_dim=8,
        rope_theta=100.0,
        rope_scaling=RopeScaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=32),
        norm_eps=1e-6,
        tie_embeddings=True,
        max_length=256,
    ),
}

Logits = Callable[[LlamaConfig, dict[str, np.ndarray], np.ndarray], np.ndarray]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_sentencepiece(TEXTS, 384)


@pytest.fixture(scope="session")
def new_params() -> Callable[[LlamaConfig, int], dict[str, np.ndarray]]:
    """Return a function that draws weights, norms too, no two alike."""

    def draw(shape: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        return {
            name: (random.uniform(0.5, 1.5, like.shape) if name.endswith("norm") else random.normal(0, 0.3, like.shape))
            .astype(np.float32)
            for name, like in abstract_model(shape)[1].items()
        }  # fmt: skip

    return draw


@pytest.fixture(scope="session")
def new_run(tokenizer: Tokenizer, new_params: Callable[..., dict[str, np.ndarray]]) -> Callable[..., Path]:
    """Return a function that makes a work directory with a checkpoint of random weights."""

    def make(workdir: Path, shape: LlamaConfig, seed: int = 0) -> Path:
        info = {"shape": shape_to_json(shape), "template": "koala", "tokenizer": tokenizer.digest}
        save_params(workdir / "checkpoints", new_params(shape, seed), info)
        (workdir / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(workdir / "tokenizer")
        return workdir

    return make


@dataclasses.dataclass(frozen=True)
class Export:
    """A model, the run it lies in, and the Hugging Face folder that was made of it."""

    shape: LlamaConfig
    params: dict[str, np.ndarray]
    run: Path
    folder: Path


@pytest.fixture(scope="session", params=SHAPES)
def export(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    new_params: Callable[..., dict[str, np.ndarray]],
    new_run: Callable[..., Path],
) -> Export:
    """Return each of SHAPES converted in fp32; tests must leave the folders as they are."""
    shape = SHAPES[request.param]
    place = tmp_path_factory.mktemp(request.param)
    run = new_run(place / "run", shape)
    convert_to_hf(run, place / "hf", None, "float32")
    return Export(shape, new_params(shape), run, place / "hf")


@pytest.fixture(scope="session")
def our_logits() -> Logits:
    """Return a function that gives our model's fp32 logits [T, V] of one sequence."""

    def compute(shape: LlamaConfig, params: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
        graphdef, _, _ = abstract_model(shape)
        places = (jnp.ones((1, len(ids)), jnp.int32), jnp.arange(len(ids))[None])

        @jax.jit
        def forward(params: dict[str, jax.Array], tokens_BT: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, params)
            return model.logits(model(tokens_BT, places)[0])[0]

        return np.asarray(forward({n: jnp.asarray(w, jnp.float32) for n, w in params.items()}, jnp.asarray(ids)[None]))

    return compute
