"""The shape of a model whose files do not tell it: from the user's word, and into the words of a config.json."""

from pathlib import Path

from easylm_like.errors import UserError
from easylm_like.hf.config import config_from_hf
from easylm_like.hf.folder import read_json
from easylm_like.model.config import LlamaConfig
from easylm_like.model.presets import PRESETS


def read_hinted_shape(hint: str) -> LlamaConfig:
    """Return the preset of that name, or the shape that a config.json, or the one of a folder, describes.

    Raises:
        UserError: it is neither, or a config.json of a model that this library does not compute.
    """
    if hint in PRESETS:
        return PRESETS[hint]
    path = Path(hint) / "config.json" if Path(hint).is_dir() else Path(hint)
    if not path.is_file():
        raise UserError(f"shape {hint!r} is no file and no known preset; presets are {', '.join(PRESETS)}")
    return config_from_hf(read_json(path), str(path))


def reference_fields(config: LlamaConfig) -> dict[str, object]:
    """Return what `reference_logits` reads of a config.json, for a model that has none."""
    model_type = "mistral" if config.sliding_window else "llama"
    model_type = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else model_type
    scaling = config.rope_scaling
    return {
        "model_type": model_type,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        },
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "max_window_layers": 0,  # the first layer with a window
        "tie_word_embeddings": config.tie_embeddings,
    }
