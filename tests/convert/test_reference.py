"""The NumPy forward pass that conversions are proven with is transformers' own."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from easylm_like.convert.reference import reference_logits
from easylm_like.hf.tensors import as_tensor

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7}


MODELS = {
    "multi-head": (LlamaForCausalLM, {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}, {}),
    "grouped": (LlamaForCausalLM, {"num_attention_heads": 4, "head_dim": 6}, {"rope_theta": 50.0}),
    "one-kv-head-tied-llama3": (LlamaForCausalLM, {"num_key_value_heads": 1, "tie_word_embeddings": True}, LLAMA3),
    "mistral": (MistralForCausalLM, {"sliding_window": 7}, {}),
    "mistral-without-a-window": (MistralForCausalLM, {"sliding_window": None}, {}),
    "qwen2": (Qwen2ForCausalLM, {"sliding_window": 7}, {}),
    "qwen2-half-windows": (Qwen2ForCausalLM, WINDOWS | {"max_window_layers": 1}, {}),
    "qwen3": (Qwen3ForCausalLM, {"head_dim": 10}, {"rope_theta": 1e6}),
    "qwen3-windows-by-name": (Qwen3ForCausalLM, WINDOWS | {"layer_types": ["sliding_attention", "full_attention"]}, {}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_logits_are_transformers(name: str, spelling: str) -> None:
    model_class, changes, rope = MODELS[name]
    sizes: dict[str, object] = {
        "vocab_size": 70,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
    } | changes
    parameters = {"rope_type": "default", "rope_theta": 100.0} | rope
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes, rope_parameters=parameters))
    for key, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in key), std=0.4)
    ids = np.random.default_rng(0).integers(0, 70, 50)
    with torch.no_grad():
        wanted = model(torch.tensor(ids)[None]).logits[0].numpy()
    sizes["model_type"] = model.config.model_type
    fields = {
        "new": sizes | {"rope_parameters": parameters},
        "old": sizes | {"rope_theta": parameters["rope_theta"], "rope_scaling": rope if "factor" in rope else None},
    }[spelling]
    weights = {name: as_tensor(weight.detach().numpy()) for name, weight in model.state_dict().items()}
    np.testing.assert_allclose(reference_logits(fields, weights, ids), wanted, atol=1e-4)
    assert wanted.std() > 0.5
