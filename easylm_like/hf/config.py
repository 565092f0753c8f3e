"""LlamaConfig <-> Hugging Face's config.json, strict about what this library does not compute."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig, RopeScaling

Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Family:
    """A `model_type`: its class, what transformers assumes where a file says nothing, and the values computed here."""

    architecture: str
    assumed: Mapping[str, object]
    required: Mapping[str, object] = field(default_factory=dict)

    def get(self, fields: Fields, name: str, default: object = None) -> object:
        """Return what a file says about `name`; what it leaves out is `assumed`, null too where that is no value."""
        value = fields.get(name, self.assumed.get(name))
        return default if value is None else value


# The defaults of the configuration classes in transformers 5.23. Families without a `sliding_window` here have none.
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048},
        {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "sliding_window": None},
    ),
    "mistral": Family(
        "MistralForCausalLM", {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
        | {"head_dim": 128},
        {"attention_bias": False},
    ),
}
# Settings of models that are close to the family, and the one value with which they change nothing.
_REQUIRED = {
    "hidden_act": "silu",
    "no_rope_layers": None,
    "partial_rotary_factor": 1,
    "quantization_config": None,
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def config_to_hf(config: LlamaConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, object]:
    """Return config.json's content, for readers old and new.

    transformers 5 reads `rope_parameters` and `dtype`; older transformers, MLX and mistral.rs read `rope_theta`,
    `rope_scaling` and `torch_dtype`, and compute other logits in silence when they miss them.

    Raises:
        UserError: no model_type has this combination of switches.
    """
    return {
        **shape_to_hf(config),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def shape_to_hf(config: LlamaConfig) -> dict[str, object]:
    """Return the fields of a config.json that say how the model is computed; raises as `config_to_hf` does."""
    model_type = _model_type(config)
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
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
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
        **_switches(config, model_type),
    }


def config_from_hf(fields: Fields, where: str) -> LlamaConfig:
    """Return the shape that a config.json describes.

    Raises:
        UserError: it is of no known family, lacks a size, or asks for something this library does not compute.
    """
    model_type = str(fields.get("model_type"))
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{where}: model_type is {fields.get('model_type')!r}, this library computes {known}")
    family = FAMILIES[model_type]
    for name, wanted in {**_REQUIRED, **family.required}.items():
        value = fields.get(name)
        if value is not None and value != wanted:
            only = f"{wanted!r} only in a {model_type}" if wanted is not None else f"a {model_type} without it only"
            raise UserError(f"{where}: {name} is {value!r}, this library computes {only}")

    def size(name: str, default: int | None = None) -> int:
        return _size(family.get(fields, name, default), name, where)

    heads, width, layers = size("num_attention_heads"), size("hidden_size"), size("num_hidden_layers")
    theta, scaling = _rope(fields, where)
    config = LlamaConfig(
        vocab_size=size("vocab_size"),
        d_model=width,
        d_ff=size("intermediate_size"),
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", width // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(family.get(fields, "rms_norm_eps", 1e-6), "rms_norm_eps", where),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        max_length=size("max_position_embeddings"),
        sliding_window=_window(fields, family, layers, where),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
    )
    config.check()
    return config


def _model_type(config: LlamaConfig) -> str:
    """Return the family that computes such a shape."""
    if config.qk_norm and config.qkv_bias:
        raise UserError(
            "Hugging Face's format has no model_type with both qk_norm (Qwen3) and qkv_bias (Qwen2); switch one off"
        )
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    return "mistral" if config.sliding_window else "llama"


def _switches(config: LlamaConfig, model_type: str) -> dict[str, object]:
    """Return the fields that only this family has."""
    if model_type == "llama":
        return {"attention_bias": False, "mlp_bias": False}
    window = config.sliding_window
    if model_type == "mistral":
        return {"sliding_window": window}
    windows: dict[str, object] = {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": 0 if window else config.n_layers,  # the first layer with a window
        "layer_types": [_SLIDING if window else _FULL] * config.n_layers,
    }
    return windows | ({"attention_bias": False} if model_type == "qwen3" else {})


def _window(fields: Fields, family: Family, layers: int, where: str) -> int | None:
    """Return how far every layer looks back, None for all the way; layers that differ are a UserError.

    A Mistral's layers all have the window. A Qwen's have it if `use_sliding_window`: those that `layer_types` names,
    or, without it, those from `max_window_layers` on.
    """
    window, first, by_layer = family.get(fields, "sliding_window"), 0, "max_window_layers" in family.assumed
    if by_layer:
        window = window if fields.get("use_sliding_window") else None
        first = int(_number(family.get(fields, "max_window_layers"), "max_window_layers", where))
    assumed = [_FULL if window is None or layer < first else _SLIDING for layer in range(layers)]
    told = fields.get("layer_types")
    kinds = told if isinstance(told, list) else assumed
    if len(kinds) != layers or not all(kind in (_FULL, _SLIDING) for kind in kinds):
        raise UserError(
            f"{where}: layer_types must be {_FULL} or {_SLIDING} for each of {layers} layers, got {kinds!r}"
        )
    if kinds != assumed and (window is None or not by_layer):
        raise UserError(f"{where}: layer_types {kinds!r} does not agree with the file's sliding_window {window!r}")
    if len(set(kinds)) > 1:
        raise UserError(
            f"{where}: {kinds.count(_SLIDING)} of {layers} layers look back {window} tokens, the others all the way; "
            "this library computes one kind for all layers"
        )
    return _size(window, "sliding_window", where) if kinds[0] == _SLIDING else None


def _rope(fields: Fields, where: str) -> tuple[float, RopeScaling | None]:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters must be an object, got {rope!r}")
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise UserError(
            f"{where}: RoPE is told apart for {', '.join(nested)}; this library computes one for all layers"
        )
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UserError(
            f"{where}: partial_rotary_factor is {rope['partial_rotary_factor']!r}; whole heads are turned here"
        )
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


def _size(value: object, name: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {name} must be a positive number, got {value!r}")
    return value


def _number(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name} must be a number, got {value!r}")
    return float(value)
