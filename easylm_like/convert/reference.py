"""A forward pass of the LLaMA family in plain NumPy, over the arrays of any format as they lie in their files.

It shares no line with the model, the key tables or the reading of config.json, so that a mistake in one of them shows
as a difference in the logits. What the file's `model_type` does not say (biases in a llama) is not computed, as in
transformers. One matrix is in memory at a time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from easylm_like.hf.tensors import Tensors

Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a format names its arrays ({} is the layer) and what it does with them.

    `transposed`: matrices are [in, out] instead of [out, in] (the embedding and norms never are). `interleaved`: RoPE
    turns the neighbours (2i, 2i + 1) of a head, as in Meta's code, instead of i and i + H / 2.
    """

    embed: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    attention_norm: str = "model.layers.{}.input_layernorm.weight"
    q: str = "model.layers.{}.self_attn.q_proj.weight"
    k: str = "model.layers.{}.self_attn.k_proj.weight"
    v: str = "model.layers.{}.self_attn.v_proj.weight"
    o: str = "model.layers.{}.self_attn.o_proj.weight"
    q_bias: str = "model.layers.{}.self_attn.q_proj.bias"
    k_bias: str = "model.layers.{}.self_attn.k_proj.bias"
    v_bias: str = "model.layers.{}.self_attn.v_proj.bias"
    q_norm: str = "model.layers.{}.self_attn.q_norm.weight"
    k_norm: str = "model.layers.{}.self_attn.k_norm.weight"
    mlp_norm: str = "model.layers.{}.post_attention_layernorm.weight"
    gate: str = "model.layers.{}.mlp.gate_proj.weight"
    up: str = "model.layers.{}.mlp.up_proj.weight"
    down: str = "model.layers.{}.mlp.down_proj.weight"
    transposed: bool = False
    interleaved: bool = False


HUGGING_FACE = Layout()
HEAD_ROWS = 16384  # of the vocabulary at once, or the largest matrix of a small model would be its whole memory


def reference_logits(fields: Fields, tensors: Tensors, ids: np.ndarray, layout: Layout = HUGGING_FACE) -> np.ndarray:
    """Return fp32 logits [..., T, V] of `ids` [..., T]; `fields` are those of a config.json."""
    angles = np.outer(np.arange(ids.shape[-1], dtype=np.float32), _frequencies(fields, _heads(fields)[2]))
    x = tensors[layout.embed].read()[ids].astype(np.float32)
    for layer in range(int(_number(fields, "num_hidden_layers"))):
        take = _Layer(tensors, layout, layer)
        h = _norm(x, take.vector(layout.attention_norm), fields)
        x = x + _attention(h, take, fields, angles, _window(fields, layer))
        h = _norm(x, take.vector(layout.mlp_norm), fields)
        gate, up = take.multiply(h, layout.gate), take.multiply(h, layout.up)
        x = x + take.multiply(gate / (1 + np.exp(-gate)) * up, layout.down)
    last = _Layer(tensors, layout, 0)
    x = _norm(x, last.vector(layout.final_norm), fields)
    if fields.get("tie_word_embeddings"):
        return _by_rows(x, tensors[layout.embed].read())
    head = tensors[layout.head].read()
    return _by_rows(x, head.T if layout.transposed else head)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The arrays of one layer, read when they are used."""

    tensors: Tensors
    layout: Layout
    layer: int

    def vector(self, name: str) -> np.ndarray:
        return self.tensors[name.format(self.layer)].read().astype(np.float32)

    def multiply(self, x: np.ndarray, name: str) -> np.ndarray:
        matrix = self.vector(name)
        flat = x.reshape(-1, x.shape[-1]) @ (matrix if self.layout.transposed else matrix.T)  # one product, not B
        return flat.reshape(*x.shape[:-1], -1)


def _by_rows(x: np.ndarray, head: np.ndarray) -> np.ndarray:
    blocks = (head[start : start + HEAD_ROWS].astype(np.float32) for start in range(0, len(head), HEAD_ROWS))
    return np.concatenate([x @ block.T for block in blocks], axis=-1)


def _attention(h: np.ndarray, take: _Layer, fields: Fields, angles: np.ndarray, window: float) -> np.ndarray:
    """Return what attention adds to the stream [..., T, D], given its normed input."""
    (heads, kv_heads, size), layout = _heads(fields), take.layout

    def project(name: str, bias: str, norm: str, count: int) -> np.ndarray:
        flat = take.multiply(h, name)
        if _kind(fields) == "qwen2":
            flat = flat + take.vector(bias)
        rows = flat.reshape(*flat.shape[:-1], count, size)
        return _norm(rows, take.vector(norm), fields) if norm and _kind(fields) == "qwen3" else rows

    q = _rotate(project(layout.q, layout.q_bias, layout.q_norm, heads), angles, layout.interleaved)
    k = _rotate(project(layout.k, layout.k_bias, layout.k_norm, kv_heads), angles, layout.interleaved)
    v = project(layout.v, layout.v_bias, "", kv_heads)
    k, v = (np.repeat(one, heads // kv_heads, axis=-2) for one in (k, v))
    scores = np.einsum("...tnh,...snh->...nts", q, k) / math.sqrt(size)
    back = np.arange(len(angles))[:, None] - np.arange(len(angles))
    scores = np.where((back >= 0) & (back < window), scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = np.einsum("...nts,...snh->...tnh", scores / scores.sum(axis=-1, keepdims=True), v)
    return take.multiply(mixed.reshape(*h.shape[:-1], heads * size), layout.o)


def _window(fields: Fields, layer: int) -> float:
    """Return how many tokens this layer's queries see."""
    window, kinds = fields.get("sliding_window", 4096), fields.get("layer_types")
    if _kind(fields) == "llama" or not isinstance(window, int):
        return math.inf
    if _kind(fields) == "mistral":
        return window
    slides = layer >= _number(fields, "max_window_layers", 28)
    if isinstance(kinds, list):
        slides = kinds[layer] == "sliding_attention"
    return window if fields.get("use_sliding_window") and slides else math.inf


def _heads(fields: Fields) -> tuple[int, int, int]:
    """Return query heads, key/value heads and the size of one."""
    heads = int(_number(fields, "num_attention_heads"))
    kv_heads = _number(fields, "num_key_value_heads", {"llama": heads, "mistral": 8}.get(_kind(fields), 32))
    size = 128 if _kind(fields) == "qwen3" else _number(fields, "hidden_size") // heads
    return heads, int(kv_heads), int(_number(fields, "head_dim", size))


def _kind(fields: Fields) -> str:
    return str(fields.get("model_type", "llama"))


def _number(fields: Fields, name: str, default: float | None = None) -> float:
    value = fields.get(name)
    value = default if value is None else value
    assert isinstance(value, int | float), name
    return value


def _norm(x: np.ndarray, scale: np.ndarray, fields: Fields) -> np.ndarray:
    eps = _number(fields, "rms_norm_eps", 1e-6)
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale)


def _rotate(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """Return heads [..., T, N, H] turned by `angles` [T, H / 2]."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    half = x.shape[-1] // 2
    one, other = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = one * cos - other * sin, other * cos + one * sin
    return np.stack(turned, axis=-1).reshape(x.shape) if interleaved else np.concatenate(turned, axis=-1)


def _frequencies(fields: Mapping[str, object], size: int) -> np.ndarray:
    rope: dict[str, object] = {"rope_theta": fields.get("rope_theta", 10_000.0)}
    for name in ("rope_scaling", "rope_parameters"):  # transformers 4, transformers 5
        part = fields.get(name)
        rope |= part if isinstance(part, dict) else {}
    number = {name: float(value) for name, value in rope.items() if isinstance(value, int | float)}
    frequencies = 1.0 / number["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size)
    if rope.get("rope_type", "default") == "default":
        return np.asarray(frequencies)
    # Llama 3.1, told by wavelength as in Meta's published code
    factor, low, high = (number[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original, stretched = number["original_max_position_embeddings"], []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            stretched.append(frequency)
        elif wavelength > original / low:
            stretched.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            stretched.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(stretched, np.float32)
