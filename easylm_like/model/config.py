"""The shape of a LLaMA and how it is computed, with the published sizes by name."""

from dataclasses import dataclass
from enum import StrEnum

from easylm_like.errors import UserError


class Remat(StrEnum):
    """What the backward pass finds saved: everything, or only each layer's input (the rest is computed again)."""

    NONE = "none"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary wavelengths (`rope_type` "llama3" in a Hugging Face config)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Architecture (as in a config.json) and computation of one model; hashable, so that jit can treat it as static."""

    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_length: int = 2048
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    scan_layers: bool = True
    remat: Remat = Remat.NONE

    def sizes(self) -> dict[str, int]:
        """Return the size of every logical axis that a weight can have."""
        return {
            "layers": self.n_layers,
            "vocab": self.vocab_size,
            "embed": self.d_model,
            "mlp": self.d_ff,
            "heads": self.n_heads,
            "kv_heads": self.n_kv_heads,
            "head": self.head_dim,
        }

    def check(self) -> None:
        """Raise UserError for a shape that no LLaMA has."""
        if wrong := [name for name, size in self.sizes().items() if size < 1]:
            raise UserError(f"the model's {wrong[0]} size must be at least 1, got {self.sizes()[wrong[0]]}")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} must be even: RoPE turns pairs")


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
