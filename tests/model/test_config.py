"""Published sizes, and shapes that no LLaMA has."""

from dataclasses import replace

import numpy as np
import pytest

from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import abstract_model
from easylm_like.model.presets import PRESETS, get_preset

from .conftest import GQA

# What the weights of the published checkpoints add up to.
PUBLISHED = {
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_30b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama31_8b": 8_030_261_248,
    "llama32_1b": 1_235_814_400,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_a_preset_has_the_published_number_of_weights(name: str, count: int) -> None:
    config = get_preset(name)
    config.check()
    _, shapes, _ = abstract_model(config)
    assert sum(int(np.prod(shape.shape)) for shape in shapes.values()) == count


def test_every_preset_is_tried_or_our_own() -> None:
    assert PRESETS.keys() - PUBLISHED.keys() == {"tiny"}
    get_preset("tiny").check()


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown model preset 'llama_8b'; known presets are tiny, llama_7b, .*llama3"):
        get_preset("llama_8b")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (replace(GQA, n_heads=4, n_kv_heads=3), "n_heads 4 must be a multiple of n_kv_heads 3"),
        (replace(GQA, n_heads=2, n_kv_heads=4), "n_heads 2 must be a multiple of n_kv_heads 4"),
        (replace(GQA, head_dim=7), "head_dim 7 must be even"),
        (replace(GQA, n_layers=0), "the model's layers size must be at least 1, got 0"),
        (replace(GQA, vocab_size=-1), "the model's vocab size must be at least 1, got -1"),
    ],
)
def test_a_shape_that_no_llama_has_is_refused(config: LlamaConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config.check()
    with pytest.raises(UserError, match=sentence):
        abstract_model(config)  # before any weight is made


def test_a_config_is_a_key() -> None:
    assert hash(GQA) == hash(replace(GQA))
    assert {GQA: 1}[replace(GQA)] == 1
    assert replace(GQA, norm_eps=1e-4) != GQA
