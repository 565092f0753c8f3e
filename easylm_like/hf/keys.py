"""The one table between our weight names and Hugging Face's, used in both directions.

Ours are einsum-shaped and stacked over layers ([L, D, N, H]); theirs are one [out, in] matrix a layer. `inputs` is the
number of our leading axes (after L) that a matrix multiplies over: 0 for a vector that is added to what a matrix
gives ([L, N, H] here, [N * H] there), None for what is stored as it is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import abstract_model


@dataclass(frozen=True, slots=True)
class Key:
    """One weight: our name, their name ({} stands for the layer), and how many of our axes are inputs."""

    ours: str
    theirs: str
    inputs: int | None = None


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


def to_theirs(params: Mapping[str, np.ndarray], config: LlamaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (their name, their array) of every weight, without the padding of the vocabulary.

    A name of ours that the table does not know is a KeyError.
    """
    table = {key.ours: key for key in LLAMA_KEYS}
    for name, weight in params.items():
        key = table[name]
        layers = weight if "{}" in key.theirs else weight[None, : config.vocab_size if name in PADDED else None]
        for i, ours in enumerate(layers):
            yield key.theirs.format(i), _to_matrix(ours, key.inputs)


def to_ours(theirs: Mapping[str, np.ndarray], config: LlamaConfig, where: str) -> dict[str, np.ndarray]:
    """Return our params of a model like `config` from their arrays, the vocabulary padded with zeros.

    Raises:
        UserError: names are missing, left over or of another shape; all of them are listed.
    """
    shapes = {name: like.shape for name, like in abstract_model(config)[1].items()}
    shapes |= {name: (config.vocab_size, config.d_model) for name in PADDED if name in shapes}
    wanted = {key.ours: key for key in LLAMA_KEYS if key.ours in shapes}
    names = {n: [k.theirs.format(i) for i in range(shapes[n][0] if "{}" in k.theirs else 1)] for n, k in wanted.items()}
    expected = {their: _their_shape(shapes[n], wanted[n]) for n, theirs_of in names.items() for their in theirs_of}
    problems = [f"{name} is missing" for name in expected if name not in theirs]
    problems += [f"{name} is unknown" for name in theirs if name not in expected]
    problems += [
        f"{name} is {theirs[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in theirs and theirs[name].shape != shape
    ]
    if problems:
        raise UserError(f"{where}: the weights are not those of its config.json: {'; '.join(problems)}")
    params = {}
    for name, key in wanted.items():
        stacked = "{}" in key.theirs
        layer_shape = shapes[name][1:] if stacked else shapes[name]
        arrays = [_from_matrix(theirs[their], key.inputs, layer_shape) for their in names[name]]
        params[name] = np.stack(arrays) if stacked else arrays[0]
        if name in PADDED:
            params[name] = np.pad(params[name], ((0, config.padded_vocab - config.vocab_size), (0, 0)))
    return params


def _to_matrix(ours: np.ndarray, inputs: int | None) -> np.ndarray:
    if inputs is None:
        return np.ascontiguousarray(ours)
    matrix = ours.reshape(int(np.prod(ours.shape[:inputs])), -1).T
    return np.ascontiguousarray(matrix if inputs else matrix[:, 0])


def _from_matrix(theirs: np.ndarray, inputs: int | None, shape: tuple[int, ...]) -> np.ndarray:
    return theirs.T.reshape(shape) if inputs else theirs.reshape(shape)


def _their_shape(ours: tuple[int, ...], key: Key) -> tuple[int, ...]:
    one = ours[1:] if "{}" in key.theirs else ours
    if key.inputs is None:
        return one
    outputs = int(np.prod(one[key.inputs :]))
    return (outputs, int(np.prod(one[: key.inputs]))) if key.inputs else (outputs,)
