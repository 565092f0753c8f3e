"""A model's weights as decoding wants them: one array a matrix and layer, [out, in], in the dtype of the matmuls.

Layers are not stacked: a slice of a stack would be copied for every token. A matrix can be int8 with one scale a row
(LLM.int8's absmax quantisation per output, arXiv 2208.07339, without its outlier columns); norms, biases and the
embedding stay as they are.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easylm_like.convert.load import OpenModel
from easylm_like.errors import UserError
from easylm_like.hf.keys import LLAMA_KEYS, PADDED
from easylm_like.model.config import LlamaConfig
from easylm_like.model.partition import RULES

QUANTISED = ("q", "k", "v", "o", "gate", "up", "down")
# The logical axes of each matrix, [out, in]; `RULES` says which mesh axes they lie along.
AXES = {
    "embed": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "q": ("heads", "embed"),
    "k": ("kv_heads", "embed"),
    "v": ("kv_heads", "embed"),
    "o": ("embed", "heads"),
    "gate": ("mlp", "embed"),
    "up": ("mlp", "embed"),
    "down": ("embed", "mlp"),
    "q_bias": ("heads",),
    "k_bias": ("kv_heads",),
    "v_bias": ("kv_heads",),
}


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclass(frozen=True, slots=True)
class Int8:
    """A matrix [out, in] as int8 `values` times a `scale` a row, [out]."""

    values: jax.Array
    scale: jax.Array


Matrix = jax.Array | Int8
Layer = dict[str, Matrix]


@partial(jax.tree_util.register_dataclass, data_fields=["embed", "layers", "final_norm", "head"], meta_fields=[])
@dataclass(frozen=True, slots=True)
class Weights:
    """`embed` [V, D] (V padded), the layers' matrices by our names, `head` [V, D]: the embedding if they are tied."""

    embed: jax.Array
    layers: tuple[Layer, ...]
    final_norm: jax.Array
    head: jax.Array


def load_weights(model: OpenModel, mesh: Mesh, *, dtype: str, int8: bool = False) -> Weights:
    """Read a model's matrices one after the other and place each on `mesh`; at most one is in memory here.

    Raises:
        UserError: a weight is damaged, or the model's heads do not divide by the mesh.
    """
    config = model.config
    check_mesh(config, mesh)
    place = partial(_place, mesh, dtype=dtype)
    whole = {key.ours: key.theirs for key in LLAMA_KEYS if not key.stacked and key.theirs in model.tensors}
    rest = {name: place(name, _pad(name, model.tensors[theirs].read(), config)) for name, theirs in whole.items()}
    layers = []
    for number in range(config.n_layers):
        layer: Layer = {}
        for key in LLAMA_KEYS:
            if key.stacked and (theirs := key.theirs.format(number)) in model.tensors:
                matrix = model.tensors[theirs].read()
                quantise = int8 and key.ours in QUANTISED
                layer[key.ours] = _quantise(mesh, key.ours, matrix) if quantise else place(key.ours, matrix)
        layers.append(layer)
    return Weights(rest["embed"], tuple(layers), rest["final_norm"], rest.get("head", rest["embed"]))


def check_mesh(config: LlamaConfig, mesh: Mesh) -> None:
    """Raise UserError unless whole heads, and equal parts of F, lie on every device along `tensor`."""
    parts, sizes = mesh.shape["tensor"], {"n_kv_heads": config.n_kv_heads, "d_ff": config.d_ff}
    if bad := [f"{name} {size}" for name, size in sizes.items() if size % parts]:
        raise UserError(f"mesh tensor={parts}: the model's {' and '.join(bad)} does not divide by it; take a divisor")
    if config.d_model % mesh.shape["fsdp"]:
        raise UserError(f"mesh fsdp={mesh.shape['fsdp']}: d_model {config.d_model} does not divide by it")


def dot(matrix: Matrix, x_BD: jax.Array) -> jax.Array:
    """Return x [B, in] times `matrix` [out, in], [B, out], in x's dtype.

    The matrix is the left factor: XLA:CPU packs the right one anew at every call, and x is small.
    """
    values = matrix.values.astype(x_BD.dtype) if isinstance(matrix, Int8) else matrix
    y_BF = jax.lax.dot_general(values, x_BD, (((1,), (1,)), ((), ()))).T
    return y_BF * matrix.scale.astype(x_BD.dtype) if isinstance(matrix, Int8) else y_BF


def logits(config: LlamaConfig, weights: Weights, x_BD: jax.Array) -> jax.Array:
    """Return fp32 logits [B, vocab_size], without those of the padded vocabulary."""
    contract = (((1,), (1,)), ((), ()))
    logits_VB = jax.lax.dot_general(weights.head, x_BD, contract, preferred_element_type=jnp.float32)
    return logits_VB[: config.vocab_size].T


def _place(mesh: Mesh, name: str, matrix: np.ndarray, *, dtype: str) -> jax.Array:
    kind = np.float32 if name.endswith("norm") else jnp.dtype(dtype)  # norms are computed in fp32
    return jax.device_put(matrix.astype(kind), _sharding(mesh, AXES.get(name, (None,))))


def _quantise(mesh: Mesh, name: str, matrix: np.ndarray) -> Int8:
    wide = matrix.astype(np.float32)
    scale = np.maximum(np.abs(wide).max(axis=1), np.finfo(np.float32).tiny) / 127
    values = np.rint(wide / scale[:, None]).astype(np.int8)
    return Int8(
        jax.device_put(values, _sharding(mesh, AXES[name])), jax.device_put(scale, _sharding(mesh, AXES[name][:1]))
    )


def _sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes)))


def _pad(name: str, matrix: np.ndarray, config: LlamaConfig) -> np.ndarray:
    rows = config.padded_vocab - len(matrix) if name in PADDED else 0
    return np.pad(matrix, ((0, rows), (0, 0))) if rows else matrix
