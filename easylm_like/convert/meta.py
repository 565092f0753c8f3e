"""Meta's own checkpoints: consolidated.NN.pth, one for each GPU that shared the model, and params.json.

Sources: Meta's model code (meta-llama/llama-models, models/llama3/model.py and models/checkpoint.py) for names, cuts
and the feed-forward size; transformers' convert_llama_weights_to_hf.py for the sequence lengths of each version and for
the RoPE factor 32 of Llama 3.2's small models, which Meta's code lacks (32 is right, says llama-models issue 166).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from easylm_like.convert.reference import Layout, reference_logits
from easylm_like.convert.rope_rows import to_halves
from easylm_like.convert.shape import read_hinted_shape
from easylm_like.convert.source import Hints, Source
from easylm_like.data.template import get_template
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.config import shape_to_hf
from easylm_like.hf.folder import read_json
from easylm_like.hf.tensors import Tensor, Tensors
from easylm_like.hf.torch_files import open_torch
from easylm_like.model.config import LlamaConfig, RopeScaling
from easylm_like.model.presets import PRESETS


@dataclass(frozen=True, slots=True)
class MetaKey:
    """One weight: Meta's name, Hugging Face's ({} is the layer), its axes' sizes, and where the shards cut it.

    `cuts` are the axes that may be cut; none: whole in every shard. `turned`: RoPE turns its rows, which Meta has
    interleaved.
    """

    meta: str
    theirs: str
    sizes: tuple[str, ...]
    cuts: tuple[int, ...] = ()
    turned: bool = False


META_KEYS = (
    # LLaMA 1 and 2 cut the embedding's columns (ParallelEmbedding), Llama 3 its rows (VocabParallelEmbedding)
    MetaKey("tok_embeddings.weight", "model.embed_tokens.weight", ("vocab", "embed"), (0, 1)),
    MetaKey("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight", ("embed",)),
    MetaKey("layers.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight", ("heads", "embed"), (0,), True),
    MetaKey("layers.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight", ("keys", "embed"), (0,), True),
    MetaKey("layers.{}.attention.wv.weight", "model.layers.{}.self_attn.v_proj.weight", ("keys", "embed"), (0,)),
    MetaKey("layers.{}.attention.wo.weight", "model.layers.{}.self_attn.o_proj.weight", ("embed", "heads"), (1,)),
    MetaKey("layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", ("embed",)),
    MetaKey("layers.{}.feed_forward.w1.weight", "model.layers.{}.mlp.gate_proj.weight", ("mlp", "embed"), (0,)),
    MetaKey("layers.{}.feed_forward.w3.weight", "model.layers.{}.mlp.up_proj.weight", ("mlp", "embed"), (0,)),
    MetaKey("layers.{}.feed_forward.w2.weight", "model.layers.{}.mlp.down_proj.weight", ("embed", "mlp"), (1,)),
    MetaKey("norm.weight", "model.norm.weight", ("embed",)),
    MetaKey("output.weight", "lm_head.weight", ("vocab", "embed"), (0,)),
)
LAYOUT = Layout(
    embed="tok_embeddings.weight",
    head="output.weight",
    final_norm="norm.weight",
    attention_norm="layers.{}.attention_norm.weight",
    q="layers.{}.attention.wq.weight",
    k="layers.{}.attention.wk.weight",
    v="layers.{}.attention.wv.weight",
    o="layers.{}.attention.wo.weight",
    mlp_norm="layers.{}.ffn_norm.weight",
    gate="layers.{}.feed_forward.w1.weight",
    up="layers.{}.feed_forward.w3.weight",
    down="layers.{}.feed_forward.w2.weight",
    interleaved=True,
)
_HEAD, _EMBED = LAYOUT.head, LAYOUT.embed
_COMPUTED = "rope.freqs"  # in the shards of LLaMA 1 and 2
_SIZES = ("dim", "n_layers", "n_heads")
_WHOLE = (*_SIZES, "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len", "max_batch_size")
_FIELDS = (*_WHOLE, "ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope", "rope_scale_factor")
_LLAMAS = {name: shape for name, shape in PRESETS.items() if name.startswith("llama")}
_ALIKE = ("d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "head_dim", "rope_theta", "norm_eps")

Params = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Shards:
    """The files of a checkpoint, in order, and what is in each."""

    where: Path
    files: tuple[str, ...]
    tensors: tuple[Tensors, ...]

    def rows(self, name: str) -> int | None:
        """Return the rows of a matrix whose rows are cut, or None if it is missing."""
        parts = [shard[name].shape[0] for shard in self.tensors if name in shard and shard[name].shape]
        return sum(parts) or None


def open_meta(folder: Path, hints: Hints) -> Source:
    """Return the model in a folder with params.json and consolidated.00.pth, consolidated.01.pth and so on.

    What params.json does not say is taken from the arrays, from the published model of the same sizes, or assumed; the
    Source's origin says what was assumed, and `hints.shape` overrides it.

    Raises:
        UserError: a shard is missing or damaged, an array is missing, unknown or mis-shaped, or params.json has
            something that is not computed by this library.
    """
    params = _read_params(folder / "params.json")
    shards = _open_shards(folder)
    _check_count(shards, int(_number(params, "dim", 0)))
    assumed: list[str] = []
    config = _hinted(hints.shape) if hints.shape else _config(folder / "params.json", params, shards, assumed)
    native = _join(shards, config)
    config = _check_tie(folder, config, native, hints)
    fields = shape_to_hf(replace(config, tie_embeddings=_HEAD not in native))
    template = get_template(hints.template) if hints.template else None
    return Source(
        path=folder,
        format="Meta checkpoint",
        config=config,
        tensors=dict(_to_theirs(native, config)),
        logits=partial(reference_logits, fields, native, layout=LAYOUT),
        tokenizer=_tokenizer(folder, hints),
        template=template,
        origin={"path": str(folder), "params": dict(params), "shards": len(shards.files), "assumed": assumed},
    )


def _read_params(path: Path) -> Params:
    fields = read_json(path)
    if unknown := sorted(name for name in fields if name not in _FIELDS):
        raise UserError(
            f"{path}: no LLaMA from 1 to 3.3 has {', '.join(unknown)}; this library would compute another model"
        )
    wrong = [f"{name} {fields.get(name)!r}" for name in _FIELDS if not _is_right(name, fields.get(name))]
    if wrong:
        raise UserError(f"{path}: expected positive numbers, whole ones for sizes, got {', '.join(wrong)}")
    return fields


def _is_right(name: str, value: object) -> bool:
    if value is None:
        return name not in _SIZES
    if name == "use_scaled_rope":
        return isinstance(value, bool)
    kind = int if name in _WHOLE else (int, float)
    return (
        isinstance(value, kind) and not isinstance(value, bool) and (value > 0 or (name, value) == ("vocab_size", -1))
    )


def _number(params: Params, name: str, default: float) -> float:
    value = params.get(name)
    assert isinstance(value, int | float | None)
    return default if value is None else value


def _open_shards(folder: Path) -> _Shards:
    """Return the shards, all with the same names, shapes and dtypes."""
    names = sorted(file.name for file in folder.glob("consolidated.*.pth"))
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(r"consolidated\.(\d+)\.pth", name))]
    wanted = [f"consolidated.{number:02}.pth" for number in range(max(numbers, default=0) + 1)]
    if missing := [name for name in wanted if name not in names]:
        raise UserError(f"{folder}: {', '.join(missing)} missing; the model is in all of its shards together")
    shards = _Shards(folder, tuple(wanted), tuple(open_torch(folder / name) for name in wanted))
    problems = []
    first = shards.tensors[0]
    for file, shard in zip(shards.files[1:], shards.tensors[1:], strict=True):
        problems += [f"{name} is not in {file}" for name in first if name not in shard]
        problems += [f"{name} is in {file} alone" for name in shard if name not in first]
        problems += [
            f"{name} is {shard[name].dtype} {shard[name].shape} in {file}, {tensor.dtype} {tensor.shape} in {wanted[0]}"
            for name, tensor in first.items()
            if name in shard and (shard[name].shape, shard[name].dtype) != (tensor.shape, tensor.dtype)
        ]
    if problems:
        raise UserError(f"{folder}: the shards are not of one model: {'; '.join(problems)}")
    return shards


def _hinted(shape: str) -> LlamaConfig:
    config = read_hinted_shape(shape)
    if config.qkv_bias or config.qk_norm:
        raise UserError(f"{shape}: has qkv_bias or qk_norm (Qwen's), for which Meta's checkpoints have no arrays")
    return config


def _config(where: Path, params: Params, shards: _Shards, assumed: list[str]) -> LlamaConfig:
    """Return the shape of the model; what no file says is added to `assumed`, in words."""
    dim, layers, heads = (int(_number(params, name, 0)) for name in _SIZES)
    if min(dim, layers, heads) < 1 or dim % heads:
        raise UserError(f"{where}: dim {dim} must be a multiple of n_heads {heads}, and n_layers {layers} at least 1")
    config = LlamaConfig(
        vocab_size=_vocabulary(params, shards, dim),
        d_model=dim,
        d_ff=_feed_forward(where, params, shards, dim),
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=int(_number(params, "n_kv_heads", heads)),
        head_dim=dim // heads,
        rope_theta=float(_number(params, "rope_theta", 10_000.0)),
        norm_eps=float(_number(params, "norm_eps", 1e-5)),
    )
    config.check()
    scaled = bool(params.get("use_scaled_rope"))
    published = [
        (name, shape)
        for name, shape in _LLAMAS.items()
        if all(getattr(shape, size) == getattr(config, size) for size in _ALIKE)
        and (shape.rope_scaling is not None) == scaled
    ]
    name, known = published[0] if published else (None, None)
    scaling = _scaling(params, name, known, assumed) if scaled else None
    length = _length(params, config, name, known, assumed)
    tied = _HEAD not in shards.tensors[0] or (known is not None and known.tie_embeddings)
    return replace(config, rope_scaling=scaling, max_length=length, tie_embeddings=tied)


def _check_count(shards: _Shards, dim: int) -> None:
    """Raise UserError if shards are missing at the end, where their numbers do not show it."""
    rows, count = shards.rows("layers.0.attention.wq.weight"), len(shards.files)
    if rows and rows < dim and dim * count % rows == 0:
        raise UserError(
            f"{shards.where}: {count} of {dim * count // rows} shards are there ({', '.join(shards.files)}); "
            "copy the missing ones beside them"
        )


def _vocabulary(params: Params, shards: _Shards, dim: int) -> int:
    """Return the vocabulary's size; LLaMA 1 and 2 say -1."""
    told = int(_number(params, "vocab_size", -1))
    if told > 0:
        return told
    embed = shards.tensors[0].get(_EMBED)
    by_columns = embed is not None and embed.shape[-1] != dim
    rows = shards.rows(_HEAD) or shards.rows(_EMBED) or 1
    return rows // len(shards.files) if by_columns and _HEAD not in shards.tensors[0] else rows


def _feed_forward(where: Path, params: Params, shards: _Shards, dim: int) -> int:
    """Return the feed-forward size, as Meta's FeedForward computes it and the arrays have it."""
    multiple = int(_number(params, "multiple_of", 256))
    wanted = int(_number(params, "ffn_dim_multiplier", 1.0) * int(2 * 4 * dim / 3))
    wanted = multiple * -(-wanted // multiple)
    found = shards.rows("layers.0.feed_forward.w1.weight")
    if found not in (None, wanted):
        raise UserError(
            f"{where}: multiple_of {multiple} and ffn_dim_multiplier {params.get('ffn_dim_multiplier')} make a "
            f"feed-forward size of {wanted}, the arrays have {found}; is it the params.json of this model?"
        )
    return wanted


def _scaling(params: Params, name: str | None, known: LlamaConfig | None, assumed: list[str]) -> RopeScaling:
    told = known.rope_scaling if known else None
    factor = _number(params, "rope_scale_factor", told.factor if told else 8.0)
    if params.get("rope_scale_factor") is None:
        assumed.append(f"RoPE factor {factor:g}, as {name or 'in Llama 3.1'} has it")
    return RopeScaling(factor=factor, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)


def _length(
    params: Params, config: LlamaConfig, name: str | None, known: LlamaConfig | None, assumed: list[str]
) -> int:
    """Return the longest sequence the model was made for, which Meta's params.json leaves to the code."""
    if params.get("max_seq_len") is not None:
        return int(_number(params, "max_seq_len", 0))
    length, why = 4096, "Llama 2"
    if known:
        length, why = known.max_length, str(name)
    elif params.get("use_scaled_rope"):
        length, why = 131072, "Llama 3.1"
    elif config.rope_theta == 1e6:
        length, why = 16384, "Code Llama"
    elif config.rope_theta == 5e5:
        length, why = 8192, "Llama 3"
    elif config.norm_eps == 1e-6:
        length, why = 2048, "LLaMA 1"
    assumed.append(f"sequences of {length} tokens, as {why} has them")
    return length


def _join(shards: _Shards, config: LlamaConfig) -> dict[str, Tensor]:
    """Return Meta's arrays, whole, by Meta's names; a UserError lists what is missing, unknown or mis-shaped."""
    joined: dict[str, Tensor] = {}
    problems = []
    expected = {meta: key for meta, _, key in _names(config)}
    for name, key in expected.items():
        parts = [shard[name] for shard in shards.tensors if name in shard]
        shape, found = _shape(key, config), _joins(key, name, parts, _shape(key, config))
        if parts and found is None:
            cut = f" in each of {len(parts)} shards" if len(parts) > 1 else ""
            problems.append(f"{name} is {parts[0].shape}{cut}, which does not make {shape}")
        elif found is not None:
            joined[name] = Tensor(shape, parts[0].dtype, found)
        elif name != _HEAD or not config.tie_embeddings:
            problems.append(f"{name} is missing")
    unknown = [name for name in shards.tensors[0] if name not in expected and name != _COMPUTED]
    problems += [f"{name} is unknown" for name in unknown]
    if problems:
        raise UserError(f"{shards.where}: the weights are not those of its params.json: {'; '.join(problems)}")
    return joined


def _names(config: LlamaConfig) -> Iterator[tuple[str, str, MetaKey]]:
    """Yield Meta's and Hugging Face's name of every weight."""
    for key in META_KEYS:
        for layer in range(config.n_layers if "{}" in key.meta else 1):
            yield key.meta.format(layer), key.theirs.format(layer), key


def _shape(key: MetaKey, config: LlamaConfig) -> tuple[int, ...]:
    heads, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    sizes = {"vocab": config.vocab_size, "embed": config.d_model, "mlp": config.d_ff, "heads": heads, "keys": keys}
    return tuple(sizes[name] for name in key.sizes)


def _joins(key: MetaKey, name: str, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Callable[[], np.ndarray] | None:
    """Return what reads the whole array of `shape` from its parts, or None if they do not make one."""
    if not parts:
        return None
    if not key.cuts and parts[0].shape == shape:
        return partial(_read_copies, name, parts)
    for axis in key.cuts:
        whole = list(parts[0].shape)
        if axis < len(whole):
            whole[axis] *= len(parts)
            if tuple(whole) == shape:
                return partial(_read_parts, parts, axis, shape)
    return None


def _read_parts(parts: Sequence[Tensor], axis: int, shape: tuple[int, ...]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0].read()
    array, size = np.empty(shape, parts[0].dtype), parts[0].shape[axis]
    for number, part in enumerate(parts):
        array[(slice(None),) * axis + (slice(number * size, (number + 1) * size),)] = part.read()
    return array


def _read_copies(name: str, parts: Sequence[Tensor]) -> np.ndarray:
    first, *others = (part.read() for part in parts)
    for number, other in enumerate(others, 1):
        if other.tobytes() != first.tobytes():
            raise UserError(f"consolidated.{number:02}.pth: {name} is not that of consolidated.00.pth; copy both again")
    return first


def _check_tie(folder: Path, config: LlamaConfig, native: Tensors, hints: Hints) -> LlamaConfig:
    """Return the shape, the head tied to the embedding only if Meta's files have it twice or not at all."""
    if not config.tie_embeddings or _HEAD not in native:
        return config
    head, embed = (native[name].read().view(np.uint8) for name in (_HEAD, _EMBED))
    if np.array_equal(head, embed):
        return config
    if hints.shape:
        raise UserError(f"{folder}: {hints.shape} ties the head to the embedding, but {_HEAD} is not {_EMBED}")
    return replace(config, tie_embeddings=False)


def _to_theirs(native: Tensors, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face's name and array of every weight."""
    for meta, theirs, key in _names(config):
        if meta in native and not (meta == _HEAD and config.tie_embeddings):
            tensor = native[meta]
            yield theirs, tensor.then(partial(to_halves, head_dim=config.head_dim)) if key.turned else tensor


def _tokenizer(folder: Path, hints: Hints) -> Tokenizer | None:
    """Return the hinted tokenizer, or the tokenizer.model here or, as in LLaMA 1's download, one folder up."""
    if hints.tokenizer is not None:
        return load_tokenizer(hints.tokenizer)
    for path in (folder / "tokenizer.model", folder.absolute().parent / "tokenizer.model"):
        if path.is_file():
            with path.open("rb") as file:
                if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\n", file.readline(4096)):
                    raise UserError(
                        f"{path}: Llama 3's tokenizer in tiktoken's format, which does not say how text is split; give "
                        "the folder of a Hugging Face tokenizer for this model as --tokenizer=DIR"
                    )
            return load_tokenizer(path)
    return None
