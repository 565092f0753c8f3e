"""What the tests of training share: tiny data with good and bad answers, a tiny model, and its twin in torch."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from easylm_like.data.loader import Batch
from easylm_like.data.tokenizer import train_sentencepiece
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import Params, abstract_model
from easylm_like.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig

# Every axis divides by the meshes that are tried: D by 8, heads, F and V by 2.
SHAPE = LlamaConfig(
    vocab_size=384, d_model=16, d_ff=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, max_length=128
)
FRAME = ["BEGINNING OF CONVERSATION: USER: GPT: An Unhelpful Answer:"] * 20


def conversation(number: int) -> dict[str, object]:
    """Return a sum with a right or a wrong answer; every fifth conversation goes on with an answer of the other."""
    a, b = number % 7, number % 11
    right, wrong = {"content": f"It is {a + b}."}, {"content": "Who knows " + "that " * (number % 4) + "anyway?"}
    answers = [right | {"quality": "good"}, wrong | {"quality": "bad"}][:: -1 if number % 3 == 0 else 1]
    turns = [(f"What is {a} and {b}?", answers[0]), ("And now?", answers[1])][: 2 if number % 5 == 0 else 1]
    messages = [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", **answer})
    ]
    return {"id": f"c{number}", "source": ("ann", "bob")[number % 2], "messages": messages}


def write_lines(path: Path, numbers: range) -> None:
    path.write_text("".join(json.dumps(conversation(number)) + "\n" for number in numbers))


@pytest.fixture(scope="module")
def compile_fast() -> Iterator[None]:
    """Compile without XLA's dearer passes: for tests about runs, whose time would mostly go there."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train.jsonl, other.jsonl, heldout.jsonl and two tokenizers."""
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "train.jsonl", range(60))
    write_lines(folder / "other.jsonl", range(1, 61))
    write_lines(folder / "heldout.jsonl", range(60, 76))
    texts = [str(m["content"]) for number in range(60) for m in conversation(number)["messages"]]
    for name, extra in (("tokenizer", []), ("other_tokenizer", ["other words"] * 30)):
        (folder / name).mkdir()
        train_sentencepiece(FRAME + texts + extra, SHAPE.vocab_size).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def new_config(data: Path) -> Callable[[], RunConfig]:
    """Return a function that makes a run of 8 steps which logs every step and saves after step 4 and 8."""

    def make() -> RunConfig:
        config = RunConfig(steps=8, batch_size=8, log_every=1, checkpoint_every=4, heldout_every=4)
        config.data = DataConfig(
            train=str(data / "train.jsonl"),
            heldout=str(data / "heldout.jsonl"),
            tokenizer=str(data / "tokenizer"),
            row_length=64,
        )
        config.model = ModelConfig(shape=SHAPE)
        config.optim = OptimConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)
        return config

    return make


@pytest.fixture(scope="session")
def shape() -> LlamaConfig:
    return SHAPE


@pytest.fixture(scope="session")
def params() -> Params:
    """Return random weights of SHAPE; the norms too, for fresh ones are all alike."""
    random = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return (
            random.uniform(0.5, 1.5, shape) if name.endswith("norm") else random.normal(0, SHAPE.d_model**-0.5, shape)
        )

    shapes = abstract_model(SHAPE)[1]
    return {name: jnp.asarray(draw(name, like.shape), jnp.float32) for name, like in shapes.items()}


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Return 8 rows of 32: two or three records each, with padding at the end.

    The rows hold very different numbers of trained tokens, so that a mean of means is not the mean.
    """
    trained = (0.9, 0.1, 0.8, 0.1, 0.6, 0.05, 0.3, 0.2)
    random = np.random.default_rng(1)
    rows = Batch(*(np.zeros((8, 32), dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    for row in range(8):
        ends = np.sort(random.choice(np.arange(3, 28), 2 + row % 2, replace=False)).tolist()
        for segment, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
            ids = random.integers(3, SHAPE.vocab_size, end - start + 1)
            rows.tokens[row, start:end], rows.targets[row, start:end] = ids[:-1], ids[1:]
            rows.weights[row, start:end] = random.random(end - start) < trained[row]
            rows.segments[row, start:end] = segment
            rows.positions[row, start:end] = np.arange(end - start)
    return rows


class Twin:
    """The tiny model in transformers, shown one record after the other: no packing and no segments anywhere."""

    def names(self, params: Params) -> dict[str, np.ndarray]:
        """Return arrays of our layout by transformers' names, each matrix [out, in]."""
        ours = {name: np.asarray(array) for name, array in params.items()}
        whole = {"model.embed_tokens": ours["embed"], "model.norm": ours["final_norm"], "lm_head": ours["head"]}
        for i in range(SHAPE.n_layers):
            layer = f"model.layers.{i}."
            whole |= {f"{layer}self_attn.{n}_proj": ours[n][i].reshape(SHAPE.d_model, -1).T for n in "qkv"}
            whole |= {f"{layer}self_attn.o_proj": ours["o"][i].reshape(-1, SHAPE.d_model).T}
            whole |= {f"{layer}mlp.{n}_proj": ours[n][i].T for n in ("gate", "up", "down")}
            whole |= {f"{layer}input_layernorm": ours["attention_norm"][i]}
            whole |= {f"{layer}post_attention_layernorm": ours["mlp_norm"][i]}
        return {f"{name}.weight": array for name, array in whole.items()}

    def model(self, params: Params) -> LlamaForCausalLM:
        """Return transformers' model with these weights."""
        config = transformers.LlamaConfig(
            vocab_size=SHAPE.vocab_size,
            hidden_size=SHAPE.d_model,
            intermediate_size=SHAPE.d_ff,
            num_hidden_layers=SHAPE.n_layers,
            num_attention_heads=SHAPE.n_heads,
            num_key_value_heads=SHAPE.n_kv_heads,
            head_dim=SHAPE.head_dim,
            rms_norm_eps=SHAPE.norm_eps,
        )
        model = LlamaForCausalLM(config)
        model.load_state_dict({name: torch.tensor(array) for name, array in self.names(params).items()})
        return model

    def nll(self, model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
        """Return -log p of every target at its place in the batch, [B, T]; 0 at padding."""
        nll = torch.zeros(batch.tokens.shape)
        for row, segments in enumerate(batch.segments):
            for segment in range(1, segments.max() + 1):
                own = segments == segment
                logits = model(torch.tensor(batch.tokens[row, own])[None]).logits[0]
                targets = torch.tensor(batch.targets[row, own], dtype=torch.long)
                nll[row, torch.tensor(own)] = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return nll

    def loss(self, model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
        """Return the loss of the Batch contract."""
        weights = torch.tensor(batch.weights)
        return (weights * self.nll(model, batch)).sum() / weights.sum()


@pytest.fixture(scope="session")
def twin() -> Twin:
    return Twin()
