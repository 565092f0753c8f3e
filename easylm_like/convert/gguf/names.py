"""GGUF's names for Hugging Face's: of weights, and of the numbers that shape a model; one table each, for both ways.

Sources: gguf-py's constants.py for the names, llama.cpp's convert_hf_to_gguf.py for what a file of these architectures
holds. Files of the architecture llama turn neighbours of a head in RoPE, as Meta's code does; those of qwen2 and qwen3
turn halves, as Hugging Face's does.
"""

import re
from collections.abc import Mapping

import numpy as np

from easylm_like.convert.reference import Layout
from easylm_like.errors import UserError
from easylm_like.hf.config import shape_to_hf
from easylm_like.model.config import LlamaConfig, RopeScaling

Metadata = Mapping[str, object]

# model_type -> general.architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
INTERLEAVED = ("llama",)

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "model.layers.{}.self_attn.q_proj.bias": "blk.{}.attn_q.bias",
    "model.layers.{}.self_attn.k_proj.bias": "blk.{}.attn_k.bias",
    "model.layers.{}.self_attn.v_proj.bias": "blk.{}.attn_v.bias",
    "model.layers.{}.self_attn.q_norm.weight": "blk.{}.attn_q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "blk.{}.attn_k_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1's scaling divides each frequency by

LAYOUT = Layout(
    embed="token_embd.weight",
    head="output.weight",
    final_norm="output_norm.weight",
    attention_norm="blk.{}.attn_norm.weight",
    q="blk.{}.attn_q.weight",
    k="blk.{}.attn_k.weight",
    v="blk.{}.attn_v.weight",
    o="blk.{}.attn_output.weight",
    q_bias="blk.{}.attn_q.bias",
    k_bias="blk.{}.attn_k.bias",
    v_bias="blk.{}.attn_v.bias",
    q_norm="blk.{}.attn_q_norm.weight",
    k_norm="blk.{}.attn_k_norm.weight",
    mlp_norm="blk.{}.ffn_norm.weight",
    gate="blk.{}.ffn_gate.weight",
    up="blk.{}.ffn_up.weight",
    down="blk.{}.ffn_down.weight",
)

# What follows "llama." or another architecture -> the field of a config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",  # llama.cpp passes it over in these architectures
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
}
REQUIRED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
# What says nothing about the computation, and values with which others change nothing, beside zero and an empty text.
HARMLESS = ("tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned")
NEUTRAL = {
    "attention.causal": True,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
}


def gguf_name(name: str) -> str:
    """Return GGUF's name of one of Hugging Face's weights."""
    layer = re.search(r"\.(\d+)\.", name)
    return NAMES[name] if layer is None else NAMES[name.replace(layer[0], ".{}.", 1)].format(layer[1])


def turns_rows(name: str, architecture: str) -> bool:
    """Return whether this weight of Hugging Face's has its rows in another order in a GGUF file."""
    return architecture in INTERLEAVED and any(part in name for part in (".q_proj.", ".k_proj."))


def shape_to_metadata(config: LlamaConfig) -> dict[str, object]:
    """Return what a file says about the shape: whole numbers become uint32, others float32."""
    fields = shape_to_hf(config)
    architecture = ARCHITECTURES[str(fields["model_type"])]
    named = {f"{architecture}.{ours}": fields.get(theirs) for ours, theirs in SIZES.items()}
    return {name: value for name, value in named.items() if value is not None}


def shape_from_metadata(metadata: Metadata, where: str) -> dict[str, object]:
    """Return the fields of a config.json that a file's metadata tell: neither vocabulary, tying nor RoPE's scaling.

    Raises:
        UserError: it is of an architecture, or has a setting, that is not computed here, or lacks a size.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES.values():
        known = ", ".join(dict.fromkeys(ARCHITECTURES.values()))
        raise UserError(f"{where}: general.architecture is {architecture!r}; this library computes {known}")
    told = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    _refuse_what_is_not_computed(told, str(architecture), where)
    fields = {theirs: _shortest(told[ours]) for ours, theirs in SIZES.items() if ours in told}
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    if not isinstance(heads, int) or not isinstance(width, int) or not heads:
        raise UserError(f"{where}: attention.head_count is {heads!r} and embedding_length {width!r}; expected numbers")
    head_dim = told.get("attention.key_length", width // heads)
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if told.get(name, head_dim) != head_dim:
            raise UserError(f"{where}: {architecture}.{name} is {told[name]!r}; here it must be the head's {head_dim}")
    window = fields.pop("sliding_window", 0)
    model_type = "mistral" if window and architecture == "llama" else architecture
    defaults = {"num_key_value_heads": heads, "rope_theta": 10_000.0}
    own = {"model_type": model_type, "head_dim": head_dim} | _window(str(model_type), window)
    return defaults | fields | own


def scaling_to_factors(config: LlamaConfig) -> np.ndarray:
    """Return what Llama 3.1's formula divides each frequency by [H / 2], float32, as convert_hf_to_gguf.py does."""
    assert config.rope_scaling is not None
    return _factors(config.rope_scaling, config.rope_theta, config.head_dim)


def is_scaled_by(config: LlamaConfig, factors: np.ndarray) -> bool:
    """Return whether a model like `config` divides its frequencies by these factors [H / 2], to rounding."""
    own = np.ones_like(factors) if config.rope_scaling is None else scaling_to_factors(config)
    return own.shape == factors.shape and np.allclose(own, factors, rtol=1e-5, atol=0)


def scaling_from_factors(factors: np.ndarray, fields: Metadata, where: str) -> dict[str, object] | None:
    """Return `rope_scaling` of a config.json that makes these factors [H / 2]; None if they change nothing.

    The published models have low 1, high 4, original length 8192 and factor 8 or 32. Other powers of two and other
    factors are tried too: what gives the same factors is the same computation.

    Raises:
        UserError: none gives these factors.
    """
    theta, head_dim = fields["rope_theta"], 2 * len(factors)
    assert isinstance(theta, float)
    if np.all(factors == 1):
        return None
    for length in (8192, *(1 << power for power in range(4, 21))):
        for factor in (8.0, 32.0, float(f"{factors.max():.6g}")):
            scaling = RopeScaling(
                factor=factor, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=length
            )
            if np.allclose(_factors(scaling, theta, head_dim), factors, rtol=1e-5, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": length,
                }
    raise UserError(
        f"{where}: {ROPE_FACTORS} ({factors.min():.4g} to {factors.max():.4g}) is not made by Llama 3.1's formula with "
        "a published setting; give the model's config.json with --shape"
    )


def _factors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = np.clip((scaling.original_length / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)


def _refuse_what_is_not_computed(told: Metadata, architecture: str, where: str) -> None:
    if missing := [name for name in REQUIRED if name not in told]:
        raise UserError(f"{where}: lacks {', '.join(f'{architecture}.{name}' for name in missing)}")
    strange = [
        f"{architecture}.{name} = {value!r}"
        for name, value in told.items()
        if name not in SIZES and name not in HARMLESS and value and value != NEUTRAL.get(name)
    ]
    if strange:
        raise UserError(f"{where}: asks for what is not computed here: {', '.join(strange)}")


def _window(model_type: str, window: object) -> dict[str, object]:
    if not window or model_type == "mistral":
        return {"sliding_window": window or None}
    return {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}


def _shortest(value: object) -> object:
    """Return a float32 as the shortest number that rounds to it: 1e-05, where the file has 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
