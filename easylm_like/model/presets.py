"""The published sizes of the family by name: FAMILY_SIZE, with the family's version digits joined and "." written "_".

`qwen25_0_5b` is Qwen2.5-0.5B. Where a base model and its chat model differ (length, norm_eps) the base model's numbers
are here; Qwen3's are the chat model's, whose repository has the plain name.
"""

from dataclasses import replace

from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig, RopeScaling


def _sized(family: LlamaConfig, D: int, F: int, L: int, N: int, K: int, H: int = 128) -> LlamaConfig:
    return replace(family, d_model=D, d_ff=F, n_layers=L, n_heads=N, n_kv_heads=K, head_dim=H)


def _stretch(factor: float) -> RopeScaling:
    return RopeScaling(factor=factor, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)


# One member of each family, then what its sizes differ in. Sources: the papers LLaMA (arXiv 2302.13971, table 2), Llama
# 2 (2307.09288), Llama 3 (2407.21783, table 3), Mistral 7B (2310.06825, table 1), Qwen2 (2407.10671, table 1), Qwen2.5
# (2412.15115), Qwen3 (2505.09388, table 1), SmolLM2 (2502.02737), and the config.json that each checkpoint has on
# Hugging Face.
_LLAMA = LlamaConfig(
    vocab_size=32000, d_model=4096, d_ff=11008, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, norm_eps=1e-6
)
_LLAMA2 = replace(_LLAMA, norm_eps=1e-5, max_length=4096)
_LLAMA3 = replace(_LLAMA2, vocab_size=128256, rope_theta=5e5, max_length=8192)
_LLAMA31 = replace(_LLAMA3, rope_scaling=_stretch(8.0), max_length=131072)
_LLAMA32 = replace(_LLAMA31, rope_scaling=_stretch(32.0), tie_embeddings=True)
_MISTRAL = replace(_LLAMA2, sliding_window=4096, max_length=32768)
_MISTRAL_V03 = replace(_MISTRAL, vocab_size=32768, rope_theta=1e6, sliding_window=None)
_QWEN2 = replace(_LLAMA, vocab_size=152064, rope_theta=1e6, max_length=131072, qkv_bias=True)
_QWEN2_SMALL = replace(_QWEN2, vocab_size=151936, tie_embeddings=True)
_QWEN3 = replace(_LLAMA, vocab_size=151936, rope_theta=1e6, max_length=40960, qk_norm=True)
_QWEN3_SMALL = replace(_QWEN3, tie_embeddings=True)
_SMOLLM2 = replace(_LLAMA2, vocab_size=49152, rope_theta=1e5, max_length=8192, tie_embeddings=True)

PRESETS = {
    "tiny": _sized(replace(_LLAMA2, vocab_size=512, max_length=2048), 192, 512, 4, 6, 3, 32),
    # name                          family      D      F    L   N   K   H (128 unless told)
    "llama_7b": _sized(_LLAMA, 4096, 11008, 32, 32, 32),
    "llama_13b": _sized(_LLAMA, 5120, 13824, 40, 40, 40),
    "llama_30b": _sized(_LLAMA, 6656, 17920, 60, 52, 52),
    "llama_65b": _sized(replace(_LLAMA, norm_eps=1e-5), 8192, 22016, 80, 64, 64),
    "llama2_7b": _sized(_LLAMA2, 4096, 11008, 32, 32, 32),
    "llama2_13b": _sized(_LLAMA2, 5120, 13824, 40, 40, 40),
    "llama2_70b": _sized(_LLAMA2, 8192, 28672, 80, 64, 8),
    "llama3_8b": _sized(_LLAMA3, 4096, 14336, 32, 32, 8),
    "llama3_70b": _sized(_LLAMA3, 8192, 28672, 80, 64, 8),
    "llama31_8b": _sized(_LLAMA31, 4096, 14336, 32, 32, 8),
    "llama31_70b": _sized(_LLAMA31, 8192, 28672, 80, 64, 8),
    "llama31_405b": _sized(_LLAMA31, 16384, 53248, 126, 128, 8),
    "llama32_1b": _sized(_LLAMA32, 2048, 8192, 16, 32, 8, 64),
    "llama32_3b": _sized(_LLAMA32, 3072, 8192, 28, 24, 8),
    "llama33_70b": _sized(_LLAMA31, 8192, 28672, 80, 64, 8),
    "mistral_7b": _sized(_MISTRAL, 4096, 14336, 32, 32, 8),
    "mistral_7b_v03": _sized(_MISTRAL_V03, 4096, 14336, 32, 32, 8),
    "qwen2_0_5b": _sized(_QWEN2_SMALL, 896, 4864, 24, 14, 2, 64),
    "qwen2_1_5b": _sized(_QWEN2_SMALL, 1536, 8960, 28, 12, 2),
    "qwen2_7b": _sized(_QWEN2, 3584, 18944, 28, 28, 4),
    "qwen2_72b": _sized(replace(_QWEN2, norm_eps=1e-5), 8192, 29568, 80, 64, 8),
    "qwen25_0_5b": _sized(replace(_QWEN2_SMALL, max_length=32768), 896, 4864, 24, 14, 2, 64),
    "qwen25_1_5b": _sized(_QWEN2_SMALL, 1536, 8960, 28, 12, 2),
    "qwen25_3b": _sized(replace(_QWEN2_SMALL, max_length=32768), 2048, 11008, 36, 16, 2),
    "qwen25_7b": _sized(_QWEN2, 3584, 18944, 28, 28, 4),
    "qwen25_14b": _sized(replace(_QWEN2, norm_eps=1e-5), 5120, 13824, 48, 40, 8),
    "qwen25_32b": _sized(replace(_QWEN2, norm_eps=1e-5), 5120, 27648, 64, 40, 8),
    "qwen25_72b": _sized(replace(_QWEN2, norm_eps=1e-5), 8192, 29568, 80, 64, 8),
    "qwen3_0_6b": _sized(_QWEN3_SMALL, 1024, 3072, 28, 16, 8),
    "qwen3_1_7b": _sized(_QWEN3_SMALL, 2048, 6144, 28, 16, 8),
    "qwen3_4b": _sized(_QWEN3_SMALL, 2560, 9728, 36, 32, 8),
    "qwen3_8b": _sized(_QWEN3, 4096, 12288, 36, 32, 8),
    "qwen3_14b": _sized(_QWEN3, 5120, 17408, 40, 40, 8),
    "qwen3_32b": _sized(_QWEN3, 5120, 25600, 64, 64, 8),
    "smollm2_135m": _sized(_SMOLLM2, 576, 1536, 30, 9, 3, 64),
    "smollm2_360m": _sized(_SMOLLM2, 960, 2560, 32, 15, 5, 64),
    "smollm2_1_7b": _sized(replace(_SMOLLM2, rope_theta=130_000.0), 2048, 8192, 24, 32, 32, 64),
}


def get_preset(name: str) -> LlamaConfig:
    """Return the model shape called `name`; a UserError lists the known ones."""
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}; known presets are {', '.join(PRESETS)}")
    return PRESETS[name]
