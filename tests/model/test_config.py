"""Published sizes, and shapes that no LLaMA has."""

from dataclasses import replace

import numpy as np
import pytest

from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import abstract_model
from easylm_like.model.presets import PRESETS, get_preset

from .conftest import GQA

# The sums that Hugging Face shows for the safetensors of each checkpoint; where tied embeddings are stored twice
# (Qwen3-0.6B and 1.7B) the count that transformers gives. LLaMA 1: arXiv 2302.13971, table 2, with the exact sums.
PUBLISHED = {
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_30b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama31_405b": 405_853_388_800,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "llama33_70b": 70_553_706_496,
    "mistral_7b": 7_241_732_096,
    "mistral_7b_v03": 7_248_023_552,
    "qwen2_0_5b": 494_032_768,
    "qwen2_1_5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
    "qwen2_72b": 72_706_203_648,
    "qwen25_0_5b": 494_032_768,
    "qwen25_1_5b": 1_543_714_304,
    "qwen25_3b": 3_085_938_688,
    "qwen25_7b": 7_615_616_512,
    "qwen25_14b": 14_770_033_664,
    "qwen25_32b": 32_763_876_352,
    "qwen25_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
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
        (replace(GQA, sliding_window=-4), "the model's sliding_window size must be at least 1, got -4"),
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
