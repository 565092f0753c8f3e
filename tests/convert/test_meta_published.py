"""The checkpoints that Meta published are recognised by their params.json and their arrays' shapes alone."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from easylm_like.convert.meta import open_meta
from easylm_like.convert.source import Hints, Source
from easylm_like.model.config import LlamaConfig as Shape
from easylm_like.model.presets import PRESETS

LLAMA1: dict[str, object] = {"multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}
LLAMA2: dict[str, object] = {"multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
LLAMA3: dict[str, object] = {"norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256}
EIGHT_B: dict[str, object] = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
}
SCALED: dict[str, object] = {"use_scaled_rope": True}
# LLaMA 1 and 2: params.json of the downloads; Llama 3: models/sku_list.py of meta-llama/llama-models.
PUBLISHED: dict[str, tuple[int, dict[str, object]]] = {
    "llama_7b": (1, {"dim": 4096, "n_heads": 32, "n_layers": 32, **LLAMA1}),
    "llama_13b": (2, {"dim": 5120, "n_heads": 40, "n_layers": 40, **LLAMA1}),
    "llama2_7b": (1, {"dim": 4096, "n_heads": 32, "n_layers": 32, **LLAMA2}),
    "llama2_70b": (
        8,
        {"dim": 8192, "n_heads": 64, "n_layers": 80, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3}
        | LLAMA2
        | {"multiple_of": 4096},
    ),
    "llama3_8b": (1, {**EIGHT_B, **LLAMA3}),
    "llama31_8b": (1, {**EIGHT_B, **LLAMA3, **SCALED}),
}


def write_hollow(folder: Path, shape: Shape, shards: int, params: dict[str, object]) -> None:
    """Write a checkpoint of any size with every array a view of one number, which repeats."""
    number = torch.ones(1, dtype=torch.bfloat16)
    heads, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    sizes = {"attention.wq": (heads, shape.d_model), "attention.wk": (keys, shape.d_model)}
    sizes |= {"attention.wv": (keys, shape.d_model), "attention.wo": (shape.d_model, heads)}
    sizes |= dict.fromkeys(("feed_forward.w1", "feed_forward.w3"), (shape.d_ff, shape.d_model))
    sizes["feed_forward.w2"] = (shape.d_model, shape.d_ff)
    state = {}
    for layer in range(shape.n_layers):
        for name, (rows, columns) in sizes.items():
            by_columns = name in ("attention.wo", "feed_forward.w2")
            part = (rows, columns // shards) if by_columns else (rows // shards, columns)
            state[f"layers.{layer}.{name}.weight"] = number.expand(part)
        for name in ("attention_norm", "ffn_norm"):
            state[f"layers.{layer}.{name}.weight"] = number.expand(shape.d_model)
    state["norm.weight"] = number.expand(shape.d_model)
    state["output.weight"] = number.expand(shape.vocab_size // shards, shape.d_model)
    state["tok_embeddings.weight"] = number.expand(shape.vocab_size, shape.d_model // shards)
    torch.save(state, folder / "consolidated.00.pth")
    for shard in range(1, shards):
        os.link(folder / "consolidated.00.pth", folder / f"consolidated.{shard:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_are_recognised(name: str, tmp_path: Path) -> None:
    shards, params = PUBLISHED[name]
    write_hollow(tmp_path, PRESETS[name], shards, params)
    source = open_meta(tmp_path, Hints())
    assert source.config == PRESETS[name]
    assert source.tensors["model.layers.1.mlp.down_proj.weight"].shape == (source.config.d_model, source.config.d_ff)
    told = source.origin["assumed"]
    assert isinstance(told, list)
    assert f"sequences of {PRESETS[name].max_length} tokens, as {name} has them" in told


def llama32(folder: Path, head: float) -> Source:
    """Return Llama 3.2 3B with three ids, the embedding all ones and the head all `head`."""
    shape = PRESETS["llama32_3b"]
    params = {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "ffn_dim_multiplier": 1.0}
    write_hollow(folder, shape, 1, {**params, "multiple_of": 256, **LLAMA3, **SCALED, "vocab_size": 3})
    state = torch.load(folder / "consolidated.00.pth")
    state["tok_embeddings.weight"] = torch.ones(1).expand(3, shape.d_model)
    state["output.weight"] = torch.full((1,), head).expand(3, shape.d_model)
    torch.save(state, folder / "consolidated.00.pth")
    return open_meta(folder, Hints())


def test_a_head_that_is_the_embedding_is_tied_where_the_published_model_ties_it(tmp_path: Path) -> None:
    tied = llama32(tmp_path, 1.0)
    assert tied.config == replace(PRESETS["llama32_3b"], vocab_size=3)
    assert "lm_head.weight" not in tied.tensors
    untied = llama32(tmp_path, 2.0)
    assert not untied.config.tie_embeddings
    assert untied.tensors["lm_head.weight"].read()[0, 0] == 2
