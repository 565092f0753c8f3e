"""A forward pass of the LLaMA family in plain NumPy, written against Hugging Face's weight names and config.json.

It shares no line with the model, the key table or the reading of config.json, so that a mistake in one of them shows as
a difference in the logits. What the file's `model_type` does not say (biases in a llama) is not computed, as in
transformers.
"""

import math
from collections.abc import Mapping

import numpy as np

Fields = Mapping[str, object]
Weights = Mapping[str, np.ndarray]


def reference_logits(fields: Fields, weights: Weights, ids: np.ndarray) -> np.ndarray:
    """Return fp32 logits [T, V] of one sequence `ids` [T]; `fields` are config.json's, `weights` the folder's."""
    angles = np.outer(np.arange(len(ids), dtype=np.float32), _frequencies(fields, _heads(fields)[2]))
    turns = tuple(np.tile(f(angles), 2)[:, None, :] for f in (np.cos, np.sin))
    x = weights["model.embed_tokens.weight"][ids].astype(np.float32)
    for layer in range(int(_number(fields, "num_hidden_layers"))):
        part = {name: _take(weights, f"model.layers.{layer}.{name}") for name in _LAYER[_kind(fields)]}
        h = _norm(x, part["input_layernorm.weight"], fields)
        x = x + _attention(h, part, fields, turns, _window(fields, layer))
        h = _norm(x, part["post_attention_layernorm.weight"], fields)
        gate, up = h @ part["mlp.gate_proj.weight"].T, h @ part["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ part["mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if fields.get("tie_word_embeddings") else "lm_head.weight"
    return np.asarray(_norm(x, _take(weights, "model.norm.weight"), fields) @ _take(weights, head).T)


_LLAMA = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
_LAYER: Mapping[str, tuple[str, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": (*_LLAMA, "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "qwen3": (*_LLAMA, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
}


def _attention(
    h: np.ndarray, part: Weights, fields: Fields, turns: tuple[np.ndarray, ...], window: float
) -> np.ndarray:
    """Return what attention adds to the stream [T, D], given its normed input."""
    length, (heads, kv_heads, size) = len(h), _heads(fields)

    def project(name: str, count: int) -> np.ndarray:
        flat = h @ part[f"self_attn.{name}_proj.weight"].T + part.get(f"self_attn.{name}_proj.bias", np.float32(0))
        rows = flat.reshape(length, count, size)
        scale = part.get(f"self_attn.{name}_norm.weight")
        return rows if scale is None else _norm(rows, scale, fields)

    q, k, v = _rotate(project("q", heads), *turns), _rotate(project("k", kv_heads), *turns), project("v", kv_heads)
    k, v = (np.repeat(one, heads // kv_heads, axis=1) for one in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(size)
    back = np.arange(length)[:, None] - np.arange(length)
    scores = np.where((back >= 0) & (back < window), scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = np.einsum("nts,snh->tnh", scores / scores.sum(axis=-1, keepdims=True), v)
    return np.asarray(mixed.reshape(length, heads * size) @ part["self_attn.o_proj.weight"].T)


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


def _take(weights: Weights, name: str) -> np.ndarray:
    return weights[name].astype(np.float32)


def _norm(x: np.ndarray, scale: np.ndarray, fields: Fields) -> np.ndarray:
    eps = _number(fields, "rms_norm_eps", 1e-6)
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale)


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin


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
