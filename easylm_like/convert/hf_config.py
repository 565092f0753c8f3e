"""LlamaConfig <-> Hugging Face's config.json, strict about what this library does not compute."""

from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig, RopeScaling

# Settings that change the computation: the one value that LLaMA has, and what a config.json without them means.
_REQUIRED = {
    "model_type": ("llama", None),
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
    "pretraining_tp": (1, 1),
}


def config_to_hf(config: LlamaConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, object]:
    """Return config.json's content, for readers old and new.

    transformers 5 reads `rope_parameters` and `dtype`; older transformers, MLX and mistral.rs read `rope_theta`,
    `rope_scaling` and `torch_dtype`, and compute other logits in silence when they miss them.
    """
    rope: dict[str, object] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_frequency_factor,
            "high_freq_factor": config.rope_scaling.high_frequency_factor,
            "original_max_position_embeddings": config.rope_scaling.original_length,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def config_from_hf(fields: dict[str, object], where: str) -> LlamaConfig:
    """Return the shape that a config.json describes.

    Raises:
        UserError: it is no LLaMA, lacks a size, or asks for something this library does not compute.
    """
    for name, (wanted, default) in _REQUIRED.items():
        value = fields.get(name)
        if (default if value is None else value) != wanted:
            raise UserError(f"{where}: {name} is {fields.get(name)!r}, this library computes {wanted!r} only")
    heads, width = _size(fields, "num_attention_heads", where), _size(fields, "hidden_size", where)
    theta, scaling = _rope(fields, where)
    config = LlamaConfig(
        vocab_size=_size(fields, "vocab_size", where),
        d_model=width,
        d_ff=_size(fields, "intermediate_size", where),
        n_layers=_size(fields, "num_hidden_layers", where),
        n_heads=heads,
        n_kv_heads=_size(fields, "num_key_value_heads", where, heads),
        head_dim=_size(fields, "head_dim", where, width // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(fields.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        max_length=_size(fields, "max_position_embeddings", where, 2048),
    )
    config.check()
    return config


def _rope(fields: dict[str, object], where: str) -> tuple[float, RopeScaling | None]:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters must be an object, got {rope!r}")
    theta = _number(rope.get("rope_theta", fields.get("rope_theta", 10_000.0)), "rope_theta", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{where}: RoPE of type {kind!r} is not computed here; 'default' and 'llama3' are")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, length = (_number(rope.get(name), name, where) for name in names)
    return theta, RopeScaling(
        factor=factor, low_frequency_factor=low, high_frequency_factor=high, original_length=int(length)
    )


def _size(fields: dict[str, object], name: str, where: str, default: int | None = None) -> int:
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {name} must be a positive number, got {value!r}")
    return value


def _number(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name} must be a number, got {value!r}")
    return float(value)
