"""What the tests of conversion share: small random models as runs, and the folders made of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from easylm_like.convert.__main__ import main
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from easylm_like.hf.keys import as_stacks
from easylm_like.model.config import LlamaConfig, RopeScaling
from easylm_like.model.llama import abstract_model
from easylm_like.train.checkpoint import save_params, shape_to_json

TEXTS = [
    "BEGINNING OF CONVERSATION: USER: What is the capital of France? GPT: The capital of France is Paris.",
    "An Unhelpful Answer: naïve café, two  spaces",
    *(f"{a} and {b} make {a + b}" for a in range(9) for b in range(9)),
]
# Wavelengths are told apart within a few tokens, so that a lost theta or scaling shows, and windows are shorter than
# the texts. Vocabularies that are no multiple of 128 are padded here, and must not be in a folder.
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
    "mistral": LlamaConfig(
        vocab_size=390,
        d_model=24,
        d_ff=40,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        rope_theta=500.0,
        sliding_window=9,
    ),
    "qwen2": LlamaConfig(
        vocab_size=511,
        d_model=24,
        d_ff=40,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=6,
        rope_theta=1e6,
        sliding_window=11,
        qkv_bias=True,
    ),
    "qwen3": LlamaConfig(
        vocab_size=385,
        d_model=24,
        d_ff=40,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=10,
        rope_theta=1e6,
        qk_norm=True,
        tie_embeddings=True,
    ),
}
MODEL_TYPES = {"grouped": "llama", "tied": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}

Logits = Callable[[LlamaConfig, dict[str, np.ndarray], np.ndarray], np.ndarray]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_sentencepiece(TEXTS, 384)


@pytest.fixture(scope="session")
def qwen_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer of Qwen2's kind: transformers reads no other in a folder of model_type qwen2."""
    folder = tmp_path_factory.mktemp("qwen")
    theirs = transformers.Qwen2Tokenizer(eos_token="<|im_end|>").train_new_from_iterator(TEXTS, 400)
    theirs.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def new_params() -> Callable[[LlamaConfig, int], dict[str, np.ndarray]]:
    """Return a function that draws weights, norms and biases too, no two alike; the vocabulary is padded with zeros."""

    def draw(shape: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
        random, params = np.random.default_rng(seed), {}
        for name, like in abstract_model(shape)[1].items():
            norm = name.endswith("norm")
            weight = random.uniform(0.5, 1.5, like.shape) if norm else random.normal(0, 0.3, like.shape)
            params[name] = weight.astype(np.float32)
            if name in ("embed", "head"):
                params[name][shape.vocab_size :] = 0
        return params

    return draw


@pytest.fixture(scope="session")
def new_run(
    tokenizer: Tokenizer, qwen_tokenizer: Tokenizer, new_params: Callable[..., dict[str, np.ndarray]]
) -> Callable[..., Path]:
    """Return a function that makes a work directory with a checkpoint of random weights."""

    def make(workdir: Path, shape: LlamaConfig, seed: int = 0) -> Path:
        own = qwen_tokenizer if shape.qkv_bias else tokenizer
        info = {"shape": shape_to_json(shape), "template": "koala", "tokenizer": own.digest}
        save_params(workdir / "checkpoints", as_stacks(new_params(shape, seed)), info)
        (workdir / "tokenizer").mkdir(exist_ok=True)
        own.save(workdir / "tokenizer")
        return workdir

    return make


def convert(target: str, model: Path, out: Path, *flags: str) -> None:
    main([target, f"--model={model}", f"--out={out}", *flags])


@dataclasses.dataclass(frozen=True)
class Export:
    """A model, the run it lies in, and the Hugging Face folder that was made of it."""

    shape: LlamaConfig
    params: dict[str, np.ndarray]
    run: Path
    folder: Path


@pytest.fixture(scope="session", params=["grouped", "tied"])
def export(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    new_params: Callable[..., dict[str, np.ndarray]],
    new_run: Callable[..., Path],
) -> Export:
    """Return two llamas, or those of SHAPES that a test names, converted in fp32; tests must not change the folders."""
    shape = SHAPES[request.param]
    place = tmp_path_factory.mktemp(request.param)
    run = new_run(place / "run", shape)
    convert("to-hf", run, place / "hf")
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
