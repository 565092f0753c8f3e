"""The published sizes of the family by name."""

from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig, RopeScaling


def _llama(vocab: int, d_model: int, d_ff: int, layers: int, heads: int, kv_heads: int, **rest: object) -> LlamaConfig:
    shape = {"vocab_size": vocab, "d_model": d_model, "d_ff": d_ff, "n_layers": layers, "n_heads": heads}
    return LlamaConfig(**shape, n_kv_heads=kv_heads, head_dim=d_model // heads, **rest)  # type: ignore[arg-type]


_LLAMA31_ROPE = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)
_LLAMA32_ROPE = RopeScaling(factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)

# As published: LLaMA (arXiv 2302.13971, table 2), Llama 2 (arXiv 2307.09288), Llama 3 (arXiv 2407.21783, table 3).
PRESETS = {
    "tiny": _llama(512, 192, 512, 4, 6, 3),
    "llama_7b": _llama(32000, 4096, 11008, 32, 32, 32, norm_eps=1e-6),
    "llama_13b": _llama(32000, 5120, 13824, 40, 40, 40, norm_eps=1e-6),
    "llama_30b": _llama(32000, 6656, 17920, 60, 52, 52, norm_eps=1e-6),
    "llama_65b": _llama(32000, 8192, 22016, 80, 64, 64, norm_eps=1e-5),
    "llama2_7b": _llama(32000, 4096, 11008, 32, 32, 32, max_length=4096),
    "llama2_70b": _llama(32000, 8192, 28672, 80, 64, 8, max_length=4096),
    "llama3_8b": _llama(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, max_length=8192),
    "llama31_8b": _llama(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, rope_scaling=_LLAMA31_ROPE, max_length=131072),
    "llama32_1b": _llama(
        128256,
        2048,
        8192,
        16,
        32,
        8,
        rope_theta=5e5,
        rope_scaling=_LLAMA32_ROPE,
        max_length=131072,
        tie_embeddings=True,
    ),
}


def get_preset(name: str) -> LlamaConfig:
    """Return the model shape called `name`; a UserError lists the known ones."""
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}; known presets are {', '.join(PRESETS)}")
    return PRESETS[name]
