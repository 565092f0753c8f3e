"""A LLaMA forward pass in plain NumPy, written against Hugging Face's weight names and layouts.

It shares no line with the model or the key table, so that a mistake in either shows as a difference in the logits.
"""

import math
from collections.abc import Mapping

import numpy as np


def reference_logits(fields: Mapping[str, object], weights: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Return fp32 logits [T, V] of one sequence `ids` [T]; `fields` are config.json's, `weights` the folder's."""
    number = {name: value for name, value in fields.items() if isinstance(value, int | float)}
    heads = int(number["num_attention_heads"])
    kv_heads = int(number.get("num_key_value_heads", heads))
    size = int(number.get("head_dim", number["hidden_size"] // heads))
    eps, length = number["rms_norm_eps"], len(ids)

    def take(name: str) -> np.ndarray:
        return weights[name].astype(np.float32)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * take(name)

    angles = np.outer(np.arange(length, dtype=np.float32), _frequencies(fields, size))
    cos, sin = (np.tile(f(angles), 2)[:, None, :] for f in (np.cos, np.sin))
    x = weights["model.embed_tokens.weight"][ids].astype(np.float32)
    for layer in range(int(number["num_hidden_layers"])):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q = _rotate((h @ take(at + "self_attn.q_proj.weight").T).reshape(length, heads, size), cos, sin)
        k = _rotate((h @ take(at + "self_attn.k_proj.weight").T).reshape(length, kv_heads, size), cos, sin)
        v = (h @ take(at + "self_attn.v_proj.weight").T).reshape(length, kv_heads, size)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(size)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("nts,snh->tnh", scores / scores.sum(axis=-1, keepdims=True), v)
        x = x + mixed.reshape(length, heads * size) @ take(at + "self_attn.o_proj.weight").T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = h @ take(at + "mlp.gate_proj.weight").T
        up = h @ take(at + "mlp.up_proj.weight").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ take(at + "mlp.down_proj.weight").T
    head = "model.embed_tokens.weight" if fields.get("tie_word_embeddings") else "lm_head.weight"
    return np.asarray(norm(x, "model.norm.weight") @ take(head).T)


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
