"""Random models on the disk, written a tensor at a time, for benchmarks/convert.py."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from easylm_like.data.tokenizer import train_sentencepiece
from easylm_like.hf.config import config_to_hf
from easylm_like.model.config import LlamaConfig

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
TEXTS = [f"{a} and {b} make {a + b}" for a in range(9) for b in range(9)] + ["BEGINNING OF CONVERSATION: USER: a GPT:"]


def write_model(folder: Path, shape: LlamaConfig, dtype: str, shard_bytes: int) -> None:
    """Write a Hugging Face folder of random weights; one that is there already with the same shape stays."""
    tokenizer = train_sentencepiece(TEXTS, 300)
    fields = json.dumps(config_to_hf(shape, tokenizer, dtype), indent=2)
    mark = folder / f"made-{shard_bytes}"
    if mark.is_file() and (folder / "config.json").read_text() == fields:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    (folder / "config.json").write_text(fields)
    shards = list(_shards(_shapes(shape), DTYPES[dtype].itemsize, shard_bytes))
    random = np.random.default_rng(0)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        one = len(shards) == 1
        name = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard, dtype, random)
        where |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    mark.touch()


def _shapes(shape: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the matrices [out, in] of a plain LLaMA by Hugging Face's names."""
    if shape.qkv_bias or shape.qk_norm:
        raise SystemExit("--model: plain LLaMAs only, no Qwen")
    width, query, value = shape.d_model, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (value, width),
        "self_attn.v_proj": (value, width),
        "self_attn.o_proj": (width, query),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (shape.d_ff, width),
        "mlp.up_proj": (shape.d_ff, width),
        "mlp.down_proj": (width, shape.d_ff),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, width)}
    shapes |= {f"model.layers.{i}.{n}.weight": of for i in range(shape.n_layers) for n, of in layer.items()}
    shapes["model.norm.weight"] = (width,)
    return shapes if shape.tie_embeddings else shapes | {"lm_head.weight": (shape.vocab_size, width)}


def _shards(
    shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if shard and sum(map(prod, shard.values())) * itemsize + prod(shape) * itemsize > shard_bytes:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, random: np.random.Generator) -> None:
    """Write one safetensors file (format: github.com/huggingface/safetensors); norms around 1, the rest around 0."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            weights = random.standard_normal(shape, np.float32)
            weights *= 0.02
            weights += len(shape) == 1
            file.write(weights.astype(DTYPES[dtype]).tobytes())
