"""The shape of a model of the LLaMA family, and how it is computed."""

from dataclasses import dataclass, field
from enum import StrEnum

from easylm_like.errors import UserError

VOCAB_MULTIPLE = (
    128  # rows of the embedding and the head: whole tiles on every accelerator, and any power of two cuts them
)


class Remat(StrEnum):
    """What a layer saves for the backward pass, most first; what is not saved is computed a second time."""

    ALL = "all"  # nothing is computed twice
    MATMULS = "matmuls"  # results of matmuls with weights and of attention: norms, RoPE, SwiGLU are computed twice
    ATTENTION = "attention"  # the layer's input and the result of attention
    INPUTS = "inputs"  # the layer's input


class Attention(StrEnum):
    """The backends of model/attention.py; AUTO is resolved by `choose_attention` before anything is computed."""

    AUTO = "auto"
    XLA = "xla"  # the reference: whole score matrices; everywhere, with a cache too
    CHUNKED = "chunked"  # memory linear in the length; everywhere
    CUDNN = "cudnn"  # NVIDIA Hopper and newer, bfloat16 or float16
    SPLASH = "splash"  # TPU


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary wavelengths (`rope_type` "llama3" in a Hugging Face config)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """How a model is computed. None of it is in a config.json, and a checkpoint can be read under any of it.

    `dtype` is that of matmuls and activations. `dropout` is the rate at which the embedding and both residual branches
    are dropped; `forget` the largest rate at which earlier tokens are hidden from all later ones, drawn anew for every
    row (forgetful causal masking, arXiv 2210.13432). Koala trained with dropout 0.05 and forget 0.1. Both act only
    where noise is given. `max_segments` bounds the records in a row; cuDNN has to know it.
    """

    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: Attention = Attention.XLA
    scan_layers: bool = True
    remat: Remat = Remat.ALL
    dropout: float = 0.0
    forget: float = 0.0
    max_segments: int = 0

    def check(self) -> None:
        """Raise UserError for a rate that is none."""
        for name in ("dropout", "forget"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 0 and below 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Architecture of one model, as in a config.json, and its `compute`; hashable, so that jit can treat it as static.

    Three switches make the relatives of LLaMA: `sliding_window` (Mistral: a query sees that many tokens, its own
    among them), `qkv_bias` (Qwen2) and `qk_norm` (Qwen3: RMSNorm of every query and key head before RoPE).
    """

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
    sliding_window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    compute: Compute = field(default_factory=Compute)

    def sizes(self) -> dict[str, int]:
        """Return the size of every logical axis that a weight can have; `vocab` is padded, see `padded_vocab`."""
        return {
            "layers": self.n_layers,
            "vocab": self.padded_vocab,
            "embed": self.d_model,
            "mlp": self.d_ff,
            "heads": self.n_heads,
            "kv_heads": self.n_kv_heads,
            "head": self.head_dim,
        }

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and the head: vocab_size rounded up. The logits of the added rows are never seen."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def check(self) -> None:
        """Raise UserError for a shape that no model of the family has."""
        sizes = self.sizes() | {"vocab": self.vocab_size, "sliding_window": self.sliding_window or 1}
        if wrong := [name for name, size in sizes.items() if size < 1]:
            raise UserError(f"the model's {wrong[0]} size must be at least 1, got {sizes[wrong[0]]}")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} must be even: RoPE turns pairs")
        self.compute.check()
