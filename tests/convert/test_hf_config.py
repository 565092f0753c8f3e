"""config.json, read as transformers reads it, and refused where another computation is asked for."""

import dataclasses

import pytest
import transformers

from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.config import FAMILIES, config_from_hf, config_to_hf
from easylm_like.model.config import RopeScaling
from easylm_like.model.presets import PRESETS

from .conftest import MODEL_TYPES, SHAPES, Export

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


# What the files on Hugging Face say of the shape, fields that nothing depends on left out.
PUBLISHED: dict[str, dict[str, object]] = {
    "llama32_3b": {
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3 | {"factor": 32.0},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "mistral_7b": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2_0_5b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 131072,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen25_14b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "max_position_embeddings": 131072,
        "max_window_layers": 48,
        "num_attention_heads": 40,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "qwen3_4b": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "smollm2_1_7b": {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 130000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
}


@pytest.mark.parametrize("name", [*SHAPES, *PRESETS])
def test_there_and_back(tokenizer: Tokenizer, name: str) -> None:
    shape = (SHAPES | PRESETS)[name]
    assert config_from_hf(config_to_hf(shape, tokenizer, "float32"), "here") == shape


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_what_the_published_file_says(name: str) -> None:
    assert config_from_hf(PUBLISHED[name], "here") == PRESETS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_the_folder_is_of_the_family_that_computes_the_shape(tokenizer: Tokenizer, name: str) -> None:
    fields = config_to_hf(SHAPES[name], tokenizer, "float32")
    theirs = transformers.AutoConfig.for_model(**fields)
    assert fields["model_type"] == theirs.model_type == MODEL_TYPES[name]
    assert hasattr(transformers, fields["architectures"][0])
    kinds = {"sliding_attention" if SHAPES[name].sliding_window else "full_attention"}
    assert set(getattr(theirs, "layer_types", None) or kinds) == kinds
    assert getattr(theirs, "sliding_window", None) == SHAPES[name].sliding_window


def test_a_combination_that_no_family_has_cannot_be_written(tokenizer: Tokenizer) -> None:
    both = dataclasses.replace(SHAPES["qwen3"], qkv_bias=True)
    with pytest.raises(UserError, match=r"no model_type with both qk_norm \(Qwen3\) and qkv_bias \(Qwen2\)"):
        config_to_hf(both, tokenizer, "float32")


def test_a_mistral_without_a_window_is_a_llama(tokenizer: Tokenizer) -> None:
    shape = config_from_hf(PUBLISHED["mistral_7b"] | {"sliding_window": None}, "here")
    assert shape == dataclasses.replace(PRESETS["mistral_7b"], sliding_window=None)
    assert config_to_hf(shape, tokenizer, "float32")["model_type"] == "llama"


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("null", [False, True], ids=["left out", "null"])
def test_what_is_left_out_is_what_transformers_assumes(model_type: str, null: bool) -> None:
    fields = PLAIN | {"model_type": model_type, "num_attention_heads": 32, "hidden_size": 128, "num_hidden_layers": 40}
    if null:
        fields |= dict.fromkeys(("sliding_window", "layer_types", "rope_scaling"))
        fields |= {} if model_type == "mistral" else {"num_key_value_heads": None}  # which transformers refuses there
    shape, theirs = config_from_hf(fields, "here"), transformers.AutoConfig.for_model(**fields)
    head_dim = getattr(theirs, "head_dim", 128 // 32)
    assert (shape.n_kv_heads, shape.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert (shape.norm_eps, shape.max_length) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert shape.rope_theta == theirs.rope_parameters["rope_theta"]
    assert shape.tie_embeddings == theirs.tie_word_embeddings
    assert shape.sliding_window == getattr(theirs, "sliding_window", None)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 99, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": 99, "max_window_layers": 3}, None),
        ({"use_sliding_window": True, "sliding_window": 99, "max_window_layers": 0}, 99),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": 99}, None),  # max_window_layers is 28
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"use_sliding_window": True, "sliding_window": 99, "layer_types": [SLIDING] * 3}, 99),
        ({"use_sliding_window": True, "sliding_window": 99, "max_window_layers": 0, "layer_types": [FULL] * 3}, None),
        ({"use_sliding_window": False, "layer_types": [FULL] * 3}, None),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_qwen_has_its_window_in_all_layers_or_in_none(
    model_type: str, fields: dict[str, object], window: int | None
) -> None:
    fields = PLAIN | {"model_type": model_type, "num_key_value_heads": 8} | fields
    assert config_from_hf(fields, "here").sliding_window == window
    theirs = transformers.AutoConfig.for_model(**fields)
    assert {theirs.sliding_window if kind == SLIDING else None for kind in theirs.layer_types} == {window}


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
        ({"model_type": "gpt2"}, "model_type is 'gpt2', this library computes llama, mistral, qwen2, qwen3$"),
        ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe', this library"),
        ({"model_type": None}, "model_type is None, this library computes llama"),
        ({"attention_bias": True}, "attention_bias is True, this library computes False only in a llama"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True, .* False only in a qwen3"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', this library computes 'silu' only"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"sliding_window": 64}, "sliding_window is 64, this library computes a llama without it only"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is .*, this library computes a llama without it only"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*, .* without it only"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, this library computes 1 only"),
        ({"layer_types": [FULL, SLIDING, FULL]}, "layer_types .* does not agree with the file's sliding_window None"),
        ({"layer_types": [FULL] * 2}, "must be full_attention or sliding_attention for each of 3 layers, got"),
        ({"layer_types": ["chunked_attention"] * 3}, "must be full_attention or sliding_attention for each of 3"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive number, got 0"),
        (
            {"model_type": "mistral", "layer_types": [FULL] * 3},
            "layer_types .* does not agree with the file's sliding_window 4096",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "num_key_value_heads": 8},
            "2 of 3 layers look back 4096 tokens, the others all the way; this library computes one kind",
        ),
        (
            {"model_type": "qwen3", "layer_types": [SLIDING] * 3, "num_key_value_heads": 8},
            "does not agree with the file's sliding_window None",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE of type 'linear' is not computed here"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE of type 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25; whole heads are turned"),
        ({"rope_parameters": {FULL: {"rope_theta": 1e4}}}, "RoPE is told apart for full_attention; .* one for all"),
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
