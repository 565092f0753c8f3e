"""EasyLM's LLaMA checkpoints as a Source: its streams of parameters or of whole train states, and plain flax files.

The names of the arrays and their layout are the same over EasyLM's history, from 4718b16 (March 2023) to fe5b2c3
(August 2024; no layers are stacked, no vocabulary is padded). Its other models (GPT-J, OPT, RoBERTa) are not read.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

from easylm_like.convert.flax_stream import Index, Stored, read_index, read_stored
from easylm_like.convert.reference import Layout, reference_logits
from easylm_like.convert.rope_rows import to_halves
from easylm_like.convert.shape import read_hinted_shape
from easylm_like.convert.source import Hints, Source
from easylm_like.data.template import get_template
from easylm_like.data.tokenizer import load_tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.config import shape_to_hf
from easylm_like.hf.tensors import DTYPES, Tensor, transpose
from easylm_like.model.config import LlamaConfig
from easylm_like.model.presets import PRESETS


@dataclass(frozen=True, slots=True)
class _Key:
    """One weight: EasyLM's name, Hugging Face's ({} is the layer), and EasyLM's axes.

    V vocabulary, D model, F feed-forward, Q all query heads, K all key/value heads. Matrices are [in, out], but the
    embedding is not one. The heads of `rotated` have the pairs that RoPE turns side by side.
    """

    easylm: str
    theirs: str
    axes: str
    rotated: bool = False

    @property
    def transposed(self) -> bool:
        return len(self.axes) == 2 and self.axes != "VD"


_EMBED = "transformer/wte/embedding"
_KEYS = (
    _Key(_EMBED, "model.embed_tokens.weight", "VD"),
    _Key("transformer/h/{}/attention_norm/kernel", "model.layers.{}.input_layernorm.weight", "D"),
    _Key("transformer/h/{}/attention/wq/kernel", "model.layers.{}.self_attn.q_proj.weight", "DQ", rotated=True),
    _Key("transformer/h/{}/attention/wk/kernel", "model.layers.{}.self_attn.k_proj.weight", "DK", rotated=True),
    _Key("transformer/h/{}/attention/wv/kernel", "model.layers.{}.self_attn.v_proj.weight", "DK"),
    _Key("transformer/h/{}/attention/wo/kernel", "model.layers.{}.self_attn.o_proj.weight", "QD"),
    _Key("transformer/h/{}/ffn_norm/kernel", "model.layers.{}.post_attention_layernorm.weight", "D"),
    _Key("transformer/h/{}/feed_forward/w1/kernel", "model.layers.{}.mlp.gate_proj.weight", "DF"),
    _Key("transformer/h/{}/feed_forward/w3/kernel", "model.layers.{}.mlp.up_proj.weight", "DF"),
    _Key("transformer/h/{}/feed_forward/w2/kernel", "model.layers.{}.mlp.down_proj.weight", "FD"),
    _Key("transformer/ln_f/kernel", "model.norm.weight", "D"),
    _Key("lm_head/kernel", "lm_head.weight", "DV"),
)
# For the proof, which must not rest on the table above.
EASYLM = Layout(
    embed="transformer/wte/embedding",
    head="lm_head/kernel",
    final_norm="transformer/ln_f/kernel",
    attention_norm="transformer/h/{}/attention_norm/kernel",
    q="transformer/h/{}/attention/wq/kernel",
    k="transformer/h/{}/attention/wk/kernel",
    v="transformer/h/{}/attention/wv/kernel",
    o="transformer/h/{}/attention/wo/kernel",
    mlp_norm="transformer/h/{}/ffn_norm/kernel",
    gate="transformer/h/{}/feed_forward/w1/kernel",
    up="transformer/h/{}/feed_forward/w3/kernel",
    down="transformer/h/{}/feed_forward/w2/kernel",
    transposed=True,
    interleaved=True,
)


def open_easylm(path: Path, hints: Hints) -> Source:
    """Return the weights of one of EasyLM's files, or of the only one in a folder (of `hints.step`, if given).

    The file has no config: `hints.shape` tells it, but for the vocabulary, which is that of the arrays: EasyLM makes it
    as large as the tokenizer of the data asks (llama_train.py) and adds no padding.

    Raises:
        UserError: it is no such file, is cut off, or holds other arrays than such a model has; all are listed.
    """
    path = _choose_file(path, hints.step)
    weights, problems = _find_weights(read_index(path), path)
    found = _describe(weights)
    if hints.shape is None:
        raise UserError(
            f"{path}: EasyLM's files have no config (metadata.pkl is a pickle, which is never executed here); say with "
            f"--shape which preset or config.json it is. The arrays tell {found}, but not the heads{_fitting(weights)}"
        )
    config = read_hinted_shape(hints.shape)
    if config.qkv_bias or config.qk_norm:
        raise UserError(f"{path}: shape {hints.shape} has biases or norms of heads; EasyLM's LLaMA has neither")
    config = replace(config, vocab_size=_rows(weights) or config.vocab_size)
    problems += _compare(weights, config)
    if problems:
        raise UserError(f"{path}: not the weights of shape {hints.shape} (it has {found}): {'; '.join(problems)}")
    native = {
        name: Tensor(stored.shape, DTYPES[stored.dtype], partial(read_stored, path, stored))
        for name, stored in weights.items()
    }
    keys = {key.easylm.format(layer): (key, layer) for layer in range(config.n_layers) for key in _KEYS}
    return Source(
        path=path,
        format="EasyLM checkpoint",
        config=config,
        tensors={
            key.theirs.format(layer): _to_theirs(native[name], key, config.head_dim)
            for name, (key, layer) in keys.items()
            if name in native
        },
        logits=partial(reference_logits, shape_to_hf(config), native, layout=EASYLM),
        tokenizer=None if hints.tokenizer is None else load_tokenizer(hints.tokenizer),
        template=None if hints.template is None else get_template(hints.template),
        origin={"path": str(path)},
    )


def _choose_file(path: Path, step: int | None) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return path
    files = sorted(path.glob("streaming_*" if step is None else f"streaming_*_{step}"))
    if len(files) != 1:
        found = ", ".join(file.name for file in sorted(path.glob("streaming_*"))) or "none"
        wanted = "one streaming_ file" if step is None else f"one streaming_ file of step {step}"
        raise UserError(f"{path}: expected {wanted}, found {found}; name the file itself")
    return files[0]


def _to_theirs(tensor: Tensor, key: _Key, head_dim: int) -> Tensor:
    if not key.transposed:
        return tensor
    turned = tensor.then(transpose, tensor.shape[::-1])
    return turned.then(partial(to_halves, head_dim=head_dim)) if key.rotated else turned


def _find_weights(index: Index, path: Path) -> tuple[dict[str, Stored], list[str]]:
    """Return the arrays under the model's prefix by EasyLM's names, and what else is wrong.

    The prefix is () in files of parameters, ("params",) in those of March 2023, ("params", "params") in train states,
    where the optimizer's moments have the same names behind another prefix.
    """
    end = tuple(_EMBED.split("/"))
    prefixes = {key[: -len(end)] for key, _ in index if key[-len(end) :] == end and key[0] != "opt_state"}
    if len(prefixes) != 1:
        names = ", ".join("/".join(key) for key, _ in index[:5]) or "nothing"
        found = f"{len(prefixes)} of them" if prefixes else f"it begins with {names}"
        raise UserError(f"{path}: not a LLaMA of EasyLM's: expected one array {_EMBED}, but {found}")
    (prefix,) = prefixes
    weights, problems = {}, []
    for key, value in index:
        name = "/".join(key[len(prefix) :] if key[: len(prefix)] == prefix else key)
        if key[: len(prefix)] == prefix and isinstance(value, Stored):
            weights[name] = value
        elif not prefix or key[:1] not in (("opt_state",), ("step",)):
            problems.append(f"{name} is unknown")
    counts = Counter(key for key, _ in index)
    problems += [f"{'/'.join(key)} is there {count} times" for key, count in counts.items() if count > 1]
    return weights, problems


def _compare(weights: Mapping[str, Stored], config: LlamaConfig) -> list[str]:
    """Return a sentence for all that is missing, unknown, of another shape or of no dtype of weights."""
    sizes = {"V": config.vocab_size, "D": config.d_model, "F": config.d_ff}
    sizes |= {"Q": config.n_heads * config.head_dim, "K": config.n_kv_heads * config.head_dim}
    wanted = {
        key.easylm.format(layer): tuple(sizes[axis] for axis in key.axes)
        for layer in range(config.n_layers)
        for key in _KEYS
        if not (config.tie_embeddings and key.axes == "DV")
    }
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in wanted]
    for name, one in weights.items():
        if name in wanted and one.shape != wanted[name]:
            problems.append(f"{name} is {one.shape} instead of {wanted[name]}")
        if one.dtype not in DTYPES:
            problems.append(f"{name} is {one.dtype} instead of {', '.join(DTYPES)}")
        elif one.nbytes != prod(one.shape) * DTYPES[one.dtype].itemsize:
            problems.append(f"{name} has {one.nbytes} bytes, which {one.shape} of {one.dtype} has not")
    return problems


def _describe(weights: Mapping[str, Stored]) -> str:
    layers, width, feed_forward, _ = _sizes(weights)
    return f"{layers} layers, width {width}, feed-forward width {feed_forward}, {_rows(weights)} ids"


def _fitting(weights: Mapping[str, Stored]) -> str:
    fitting = [
        name
        for name, preset in PRESETS.items()
        if (preset.n_layers, preset.d_model, preset.d_ff, preset.n_kv_heads * preset.head_dim) == _sizes(weights)
    ]
    return f"; presets of these sizes: {', '.join(fitting)}" if fitting else ""


def _sizes(weights: Mapping[str, Stored]) -> tuple[int, int, int, int]:
    """Return layers, width, feed-forward width and keys' width, 0 where no array tells."""
    layers = {name.split("/")[2] for name in weights if name.startswith("transformer/h/")}
    ends = ("wte/embedding", "w1/kernel", "wk/kernel")
    shapes = [next((one.shape for name, one in weights.items() if name.endswith(end)), ()) for end in ends]
    width, feed_forward, keys = (shape[1] if len(shape) == 2 else 0 for shape in shapes)
    return len(layers), width, feed_forward, keys


def _rows(weights: Mapping[str, Stored]) -> int:
    shape = weights[_EMBED].shape if _EMBED in weights else ()
    return shape[0] if shape else 0
