"""The one table between our weight names and Hugging Face's, used in both directions.

Ours are einsum-shaped and stacked over layers ([L, D, N, H]); theirs are one [out, in] matrix a layer. `inputs` is the
number of our leading axes (after L) that a matrix multiplies over: 0 for a vector that is added to what a matrix
gives ([L, N, H] here, [N * H] there), None for what is stored as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from easylm_like.errors import UserError
from easylm_like.hf.tensors import Tensor, Tensors, compare_shapes, transpose
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import abstract_model


@dataclass(frozen=True, slots=True)
class Key:
    """One weight: our name, their name ({} stands for the layer), and how many of our axes are inputs."""

    ours: str
    theirs: str
    inputs: int | None = None

    @property
    def stacked(self) -> bool:
        """Return whether every layer has one of its own."""
        return "{}" in self.theirs


PADDED = ("embed", "head")  # have a row for every id, and rows of padding after them

LLAMA_KEYS = (
    Key("embed", "model.embed_tokens.weight"),
    Key("attention_norm", "model.layers.{}.input_layernorm.weight"),
    Key("q", "model.layers.{}.self_attn.q_proj.weight", 1),
    Key("k", "model.layers.{}.self_attn.k_proj.weight", 1),
    Key("v", "model.layers.{}.self_attn.v_proj.weight", 1),
    Key("o", "model.layers.{}.self_attn.o_proj.weight", 2),
    Key("q_bias", "model.layers.{}.self_attn.q_proj.bias", 0),
    Key("k_bias", "model.layers.{}.self_attn.k_proj.bias", 0),
    Key("v_bias", "model.layers.{}.self_attn.v_proj.bias", 0),
    Key("q_norm", "model.layers.{}.self_attn.q_norm.weight"),
    Key("k_norm", "model.layers.{}.self_attn.k_norm.weight"),
    Key("mlp_norm", "model.layers.{}.post_attention_layernorm.weight"),
    Key("gate", "model.layers.{}.mlp.gate_proj.weight", 1),
    Key("up", "model.layers.{}.mlp.up_proj.weight", 1),
    Key("down", "model.layers.{}.mlp.down_proj.weight", 1),
    Key("final_norm", "model.norm.weight"),
    Key("head", "lm_head.weight"),
)


@dataclass(frozen=True, slots=True)
class Stack:
    """One of our weights somewhere else, read whole or a layer at a time.

    `shape` is that of the whole, with its L axis if it is `stacked`; `read_layer(i)` brings layer i without that axis,
    and `read_layer(0)` all of a weight that is not stacked.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read_layer: Callable[[int], np.ndarray]

    def read(self) -> np.ndarray:
        """Return the whole weight."""
        if not self.stacked:
            return self.read_layer(0)
        whole = np.empty(self.shape, self.dtype)
        for layer in range(len(whole)):
            whole[layer] = self.read_layer(layer)
        return whole


Stacks = Mapping[str, Stack]


def as_stacks(params: Mapping[str, np.ndarray]) -> dict[str, Stack]:
    """Return our params that are in memory already."""
    table = {key.ours: key for key in LLAMA_KEYS}
    return {
        name: Stack(weight.shape, weight.dtype, table[name].stacked, partial(_take, weight, table[name].stacked))
        for name, weight in params.items()
    }


def to_theirs(ours: Stacks, config: LlamaConfig) -> dict[str, Tensor]:
    """Return every weight by their name and in their layout, layer by layer, the vocabulary without its padding.

    A name of ours that the table does not know is a KeyError.
    """
    table = {key.ours: key for key in LLAMA_KEYS}
    weights = [table[name] for name in ours]
    found = {}
    for layer in range(config.n_layers):
        for key in weights:
            if key.stacked or not layer:
                stack = ours[key.ours]
                rows = config.vocab_size if key.ours in PADDED else None
                shape = _their_shape(
                    stack.shape[1:] if key.stacked else (rows or stack.shape[0], *stack.shape[1:]), key
                )
                read = partial(_read_theirs, stack, layer, key.inputs, rows)
                found[key.theirs.format(layer)] = Tensor(shape, stack.dtype, read)
    return found


def to_ours(theirs: Tensors, config: LlamaConfig, where: str) -> dict[str, Stack]:
    """Return our params of a model like `config` from their arrays, the vocabulary padded with zeros.

    Raises:
        UserError: names are missing, left over or of another shape; all of them are listed.
    """
    shapes = {name: like.shape for name, like in abstract_model(config)[1].items()}
    check_names(theirs, config, where)
    ours = {}
    for key in LLAMA_KEYS:
        if key.ours in shapes:
            names = [key.theirs.format(layer) for layer in range(config.n_layers if key.stacked else 1)]
            layer_shape = shapes[key.ours][1:] if key.stacked else shapes[key.ours]
            read = partial(_read_ours, [theirs[name] for name in names], key, layer_shape)
            ours[key.ours] = Stack(shapes[key.ours], theirs[names[0]].dtype, key.stacked, read)
    return {name: ours[name] for name in shapes}


def check_names(theirs: Tensors, config: LlamaConfig, where: str) -> None:
    """Raise UserError, with all that is wrong, unless `theirs` are exactly the weights of a model like `config`."""
    if problems := compare_shapes(theirs, their_shapes(config)):
        raise UserError(f"{where}: the weights are not those of its config.json: {'; '.join(problems)}")


def their_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and the shape of every array of a model like `config`."""
    shapes = {name: like.shape for name, like in abstract_model(config)[1].items()}
    shapes |= {name: (config.vocab_size, config.d_model) for name in PADDED if name in shapes}
    return {
        key.theirs.format(layer): _their_shape(shapes[key.ours][1:] if key.stacked else shapes[key.ours], key)
        for layer in range(config.n_layers)
        for key in LLAMA_KEYS
        if key.ours in shapes and (key.stacked or not layer)
    }


def _take(weight: np.ndarray, stacked: bool, layer: int) -> np.ndarray:
    return weight[layer] if stacked else weight


def _read_theirs(stack: Stack, layer: int, inputs: int | None, rows: int | None) -> np.ndarray:
    return _to_matrix(stack.read_layer(layer)[:rows], inputs)


def _read_ours(theirs: list[Tensor], key: Key, shape: tuple[int, ...], layer: int) -> np.ndarray:
    ours = _from_matrix(theirs[layer].read(), key.inputs, (-1, *shape[1:]) if key.ours in PADDED else shape)
    return np.pad(ours, ((0, shape[0] - len(ours)), (0, 0))) if key.ours in PADDED else ours


def _to_matrix(ours: np.ndarray, inputs: int | None) -> np.ndarray:
    if inputs is None:
        return np.ascontiguousarray(ours)
    return transpose(ours.reshape(prod(ours.shape[:inputs]), -1)) if inputs else ours.reshape(-1)


def _from_matrix(theirs: np.ndarray, inputs: int | None, shape: tuple[int, ...]) -> np.ndarray:
    return (transpose(theirs) if inputs else theirs).reshape(shape)


def _their_shape(ours: tuple[int, ...], key: Key) -> tuple[int, ...]:
    """Return the shape of their array, given that of ours without the L axis."""
    if key.inputs is None:
        return ours
    outputs = prod(ours[key.inputs :])
    return (outputs, prod(ours[: key.inputs])) if key.inputs else (outputs,)
