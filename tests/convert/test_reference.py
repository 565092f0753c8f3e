"""The NumPy forward pass that conversions are proven with is transformers' own."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from easylm_like.convert.reference import reference_logits

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "tied", "rope"),
    [(4, 4, 8, False, {"rope_theta": 1e4}), (4, 2, 6, False, {"rope_theta": 50.0}), (6, 1, 8, True, LLAMA3)],
    ids=["multi-head", "grouped", "one-kv-head-tied-llama3"],
)
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_logits_are_transformers(
    heads: int, kv_heads: int, size: int, tied: bool, rope: dict[str, object], spelling: str
) -> None:
    sizes = {
        "vocab_size": 70,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": tied,
    }
    parameters = {"rope_type": "default", "rope_theta": 100.0} | rope
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=parameters))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    ids = np.random.default_rng(0).integers(0, 70, 50)
    with torch.no_grad():
        wanted = model(torch.tensor(ids)[None]).logits[0].numpy()
    fields = {
        "new": sizes | {"rope_parameters": parameters},
        "old": sizes | {"rope_theta": parameters["rope_theta"], "rope_scaling": rope if "factor" in rope else None},
    }[spelling]
    weights = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    np.testing.assert_allclose(reference_logits(fields, weights, ids), wanted, atol=1e-4)
    assert wanted.std() > 0.5
