"""The table of names works both ways, and a folder whose weights do not fit is told everything at once."""

from collections.abc import Callable

import numpy as np
import pytest

from easylm_like.convert.keys import LLAMA_KEYS, to_ours, to_theirs
from easylm_like.errors import UserError
from easylm_like.model.llama import abstract_model

from .conftest import SHAPES

NewParams = Callable[..., dict[str, np.ndarray]]


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_bit_identical(new_params: NewParams, name: str) -> None:
    params = new_params(SHAPES[name])
    theirs = dict(to_theirs(params))
    assert ("lm_head.weight" in theirs) == (name == "grouped")
    assert all(array.flags["C_CONTIGUOUS"] for array in theirs.values())  # safetensors writes the buffer as it lies
    back = to_ours(theirs, {n: w.shape for n, w in params.items()}, "here")
    assert back.keys() == params.keys()
    for weight in params:
        np.testing.assert_array_equal(back[weight], params[weight])


def test_a_matrix_is_out_by_in_with_heads_one_after_the_other(new_params: NewParams) -> None:
    params = new_params(SHAPES["grouped"])
    theirs = dict(to_theirs(params))
    q, o = theirs["model.layers.1.self_attn.q_proj.weight"], theirs["model.layers.1.self_attn.o_proj.weight"]
    assert (q.shape, o.shape) == ((32, 24), (24, 32))
    assert q[3 * 8 + 5, 7] == params["q"][1, 7, 3, 5]  # head 3, element 5, input 7
    assert o[7, 3 * 8 + 5] == params["o"][1, 3, 5, 7]
    assert theirs["model.layers.0.mlp.down_proj.weight"][2, 30] == params["down"][0, 30, 2]


def test_the_table_knows_every_weight_of_the_model() -> None:
    assert {key.ours for key in LLAMA_KEYS} == set(abstract_model(SHAPES["grouped"])[1])


def test_everything_that_does_not_fit_is_listed(new_params: NewParams) -> None:
    params = new_params(SHAPES["tied"])
    theirs = dict(to_theirs(params))
    del theirs["model.norm.weight"], theirs["model.layers.1.mlp.up_proj.weight"]
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    theirs["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
    theirs["model.layers.0.self_attn.k_proj.weight"] = np.zeros((16, 8), np.float32)
    with pytest.raises(UserError, match=r"^here: the weights are not those of its config\.json") as error:
        to_ours(theirs, {n: w.shape for n, w in params.items()}, "here")
    for problem in (
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight is missing",
        "lm_head.weight is unknown",
        "model.layers.0.self_attn.q_proj.bias is unknown",
        "model.layers.0.self_attn.k_proj.weight is (16, 8) instead of (16, 16)",
    ):
        assert problem in str(error.value)
