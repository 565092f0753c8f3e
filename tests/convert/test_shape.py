"""A shape that the user tells is the one of the config.json or preset that he names, and computes as transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from easylm_like.convert.reference import reference_logits
from easylm_like.convert.shape import read_hinted_shape
from easylm_like.errors import UserError
from easylm_like.hf.config import shape_to_hf
from easylm_like.hf.tensors import as_tensor
from easylm_like.model.presets import PRESETS

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[type[PreTrainedModel], dict[str, object], dict[str, object]]] = {
    "llama": (LlamaForCausalLM, {}, LLAMA3 | {"original_max_position_embeddings": 32}),
    "mistral": (MistralForCausalLM, {"sliding_window": 7}, {}),
    "qwen2": (Qwen2ForCausalLM, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, {}),
    "qwen2-without-a-window": (Qwen2ForCausalLM, {"tie_word_embeddings": True}, {}),
    "qwen3": (Qwen3ForCausalLM, {"head_dim": 10}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_hinted_shape_are_transformers(tmp_path: Path, name: str) -> None:
    model_class, changes, rope = MODELS[name]
    sizes = {"vocab_size": 70, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-3}
    parameters = {"rope_type": "default", "rope_theta": 100.0} | rope
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes | heads | changes, rope_parameters=parameters))
    for key, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in key), std=0.4)
    model.config.save_pretrained(tmp_path)
    config = read_hinted_shape(str(tmp_path))
    assert read_hinted_shape(str(tmp_path / "config.json")) == config
    tensors = {key: as_tensor(weight.detach().numpy()) for key, weight in model.state_dict().items()}
    ids = np.random.default_rng(0).integers(0, 70, 50)
    with torch.no_grad():
        wanted = model(torch.tensor(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(reference_logits(shape_to_hf(config), tensors, ids), wanted, atol=1e-4)


def test_a_preset_is_told_by_its_name_and_nonsense_is_refused(tmp_path: Path) -> None:
    assert read_hinted_shape("llama32_1b") == PRESETS["llama32_1b"]
    with pytest.raises(UserError, match="no file and no known preset; presets are tiny, llama_7b"):
        read_hinted_shape("llama_8b")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="model_type is 'gpt2'"):
        read_hinted_shape(str(tmp_path))
