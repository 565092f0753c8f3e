"""config.json, read as transformers reads it, and refused where another computation is asked for."""

import pytest
import transformers

from easylm_like.convert.hf_config import config_from_hf, config_to_hf
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.model.config import RopeScaling
from easylm_like.model.presets import PRESETS

from .conftest import SHAPES, Export

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}


@pytest.mark.parametrize("name", [*SHAPES, "llama2_70b", "llama31_8b", "llama32_1b"])
def test_there_and_back(tokenizer: Tokenizer, name: str) -> None:
    shape = (SHAPES | PRESETS)[name]
    assert config_from_hf(config_to_hf(shape, tokenizer, "float32"), "here") == shape


def test_what_is_left_out_is_what_transformers_assumes() -> None:
    shape, theirs = config_from_hf(PLAIN, "here"), transformers.LlamaConfig(**PLAIN)
    assert (shape.n_kv_heads, shape.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (8, 8)
    assert (shape.norm_eps, shape.max_length) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert shape.rope_theta == theirs.rope_parameters["rope_theta"]
    assert shape.tie_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"type" if key == "rope_type" else key: v for key, v in LLAMA3.items()}},
    ],
    ids=["transformers-4", "transformers-5", "before"],
)
def test_every_spelling_of_rope_is_understood(fields: dict[str, object]) -> None:
    shape = config_from_hf(PLAIN | fields, "here")
    wanted = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)
    assert (shape.rope_theta, shape.rope_scaling) == (5e5, wanted)


def test_transformers_reads_the_numbers_that_were_written(export: Export) -> None:
    theirs = transformers.AutoConfig.from_pretrained(export.folder)
    assert theirs.rope_parameters["rope_theta"] == export.shape.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("llama3" if export.shape.rope_scaling else "default")
    assert (theirs.head_dim, theirs.max_position_embeddings) == (export.shape.head_dim, export.shape.max_length)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', this library computes 'llama' only"),
        ({"attention_bias": True}, "attention_bias is True, this library computes False only"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', this library computes 'silu' only"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE of type 'linear' is not computed here"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE of type 'yarn'"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "factor must be a number, got None"),
        ({"rope_parameters": 7}, "rope_parameters must be an object, got 7"),
        ({"vocab_size": None}, "vocab_size must be a positive number, got None"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a positive number, got '3'"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be a number, got 'x'"),
        ({"num_key_value_heads": 3}, "n_heads 8 must be a multiple of n_kv_heads 3"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
    ],
)
def test_what_is_not_computed_here_is_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config_from_hf(PLAIN | fields, "here")


def test_a_config_without_a_model_type_is_no_llama() -> None:
    fields = {name: value for name, value in PLAIN.items() if name != "model_type"}
    with pytest.raises(UserError, match="model_type"):
        config_from_hf(fields, "here")
