"""The table of names works both ways, and a folder whose weights do not fit is told everything at once."""

from collections.abc import Callable

import numpy as np
import pytest

from easylm_like.errors import UserError
from easylm_like.hf import keys
from easylm_like.hf.keys import LLAMA_KEYS, as_stacks
from easylm_like.hf.tensors import as_tensor
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import abstract_model

from .conftest import SHAPES

NewParams = Callable[..., dict[str, np.ndarray]]
Arrays = dict[str, np.ndarray]


def to_theirs(params: Arrays, shape: LlamaConfig) -> Arrays:
    tensors = keys.to_theirs(as_stacks(params), shape)
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype) == (arrays[name].shape, arrays[name].dtype), name
    assert {name: array.shape for name, array in arrays.items()} == keys.their_shapes(shape)
    return arrays


def to_ours(theirs: Arrays, shape: LlamaConfig, where: str) -> Arrays:
    stacks = keys.to_ours({name: as_tensor(array) for name, array in theirs.items()}, shape, where)
    params = {name: stack.read() for name, stack in stacks.items()}
    for name, stack in stacks.items():
        assert (stack.shape, stack.dtype) == (params[name].shape, params[name].dtype), name
    return params


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_bit_identical(new_params: NewParams, name: str) -> None:
    shape, params = SHAPES[name], new_params(SHAPES[name])
    theirs = to_theirs(params, shape)
    assert theirs["model.embed_tokens.weight"].shape == (shape.vocab_size, shape.d_model)
    if shape.tie_embeddings:
        assert "lm_head.weight" not in theirs
    else:
        assert theirs["lm_head.weight"].shape == (shape.vocab_size, shape.d_model)
    assert all(array.flags["C_CONTIGUOUS"] for array in theirs.values())  # safetensors writes the buffer as it lies
    back = to_ours(theirs, shape, "here")
    assert back["embed"].shape[0] == (384 if name == "grouped" else 512)
    assert back.keys() == params.keys()
    for weight in params:
        np.testing.assert_array_equal(back[weight], params[weight])


def test_a_matrix_is_out_by_in_with_heads_one_after_the_other(new_params: NewParams) -> None:
    params = new_params(SHAPES["grouped"])
    theirs = to_theirs(params, SHAPES["grouped"])
    q, o = theirs["model.layers.1.self_attn.q_proj.weight"], theirs["model.layers.1.self_attn.o_proj.weight"]
    assert (q.shape, o.shape) == ((32, 24), (24, 32))
    assert q[3 * 8 + 5, 7] == params["q"][1, 7, 3, 5]  # head 3, element 5, input 7
    assert o[7, 3 * 8 + 5] == params["o"][1, 3, 5, 7]
    assert theirs["model.layers.0.mlp.down_proj.weight"][2, 30] == params["down"][0, 30, 2]


def test_biases_are_vectors_with_heads_one_after_the_other_and_norms_stay(new_params: NewParams) -> None:
    params = new_params(SHAPES["qwen2"])
    theirs = to_theirs(params, SHAPES["qwen2"])
    assert theirs["model.layers.1.self_attn.q_proj.bias"].shape == (4 * 6,)
    assert theirs["model.layers.1.self_attn.q_proj.bias"][3 * 6 + 5] == params["q_bias"][1, 3, 5]
    assert theirs["model.layers.0.self_attn.v_proj.bias"][6 + 2] == params["v_bias"][0, 1, 2]
    params = new_params(SHAPES["qwen3"])
    norm = to_theirs(params, SHAPES["qwen3"])["model.layers.1.self_attn.k_norm.weight"]
    np.testing.assert_array_equal(norm, params["k_norm"][1])


def test_what_is_in_the_rows_of_padding_stays_here(new_params: NewParams) -> None:
    shape, params = SHAPES["mistral"], new_params(SHAPES["mistral"])
    dirty = {name: weight.copy() for name, weight in params.items()}
    for name in ("embed", "head"):
        assert len(dirty[name][shape.vocab_size :]) == 512 - 390
        dirty[name][shape.vocab_size :] = np.nan
    for name, array in to_theirs(dirty, shape).items():
        assert np.isfinite(array).all(), name
    back = to_ours((to_theirs(dirty, shape)), shape, "here")
    np.testing.assert_array_equal(back["head"], params["head"])


def test_the_table_knows_every_weight_of_the_family() -> None:
    assert {key.ours for key in LLAMA_KEYS} == {n for shape in SHAPES.values() for n in abstract_model(shape)[1]}


def test_everything_that_does_not_fit_is_listed(new_params: NewParams) -> None:
    params = new_params(SHAPES["tied"])
    theirs = to_theirs(params, SHAPES["tied"])
    del theirs["model.norm.weight"], theirs["model.layers.1.mlp.up_proj.weight"]
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    theirs["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
    theirs["model.layers.0.self_attn.k_proj.weight"] = np.zeros((16, 8), np.float32)
    with pytest.raises(UserError, match=r"^here: the weights are not those of its config\.json") as error:
        to_ours(theirs, SHAPES["tied"], "here")
    for problem in (
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight is missing",
        "lm_head.weight is unknown",
        "model.layers.0.self_attn.q_proj.bias is unknown",
        "model.layers.0.self_attn.k_proj.weight is (16, 8) instead of (16, 16)",
    ):
        assert problem in str(error.value)


def test_a_vocabulary_of_another_size_is_told_in_rows_of_the_folder(new_params: NewParams) -> None:
    theirs = to_theirs(new_params(SHAPES["tied"]), SHAPES["tied"])
    theirs["model.embed_tokens.weight"] = np.zeros((512, 16), np.float32)
    with pytest.raises(UserError, match=r"embed_tokens.weight is \(512, 16\) instead of \(400, 16\)"):
        to_ours(theirs, SHAPES["tied"], "here")


@pytest.mark.parametrize(("name", "weight"), [("qwen2", "k_proj.bias"), ("qwen3", "q_norm.weight")])
def test_a_weight_that_only_one_family_has_may_not_be_missing(new_params: NewParams, name: str, weight: str) -> None:
    theirs = to_theirs(new_params(SHAPES[name]), SHAPES[name])
    del theirs[f"model.layers.1.self_attn.{weight}"]
    with pytest.raises(UserError, match=rf"model.layers.1.self_attn.{weight} is missing$"):
        to_ours(theirs, SHAPES[name], "here")
