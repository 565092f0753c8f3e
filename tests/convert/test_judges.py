"""Three engines that this project did not write load the exported folders and compute what the original computed.

transformers made the originals, with random weights. Its own logits of what it made are the reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ctranslate2
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from easylm_like.data.tokenizer import Tokenizer

from .conftest import convert

NEW = 10  # greedy tokens
WINDOW = 24  # shorter than what transformers is asked
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16384,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# Llama 3.1's own
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {"rope_type": "default", "rope_theta": 700.0}
CONFIGS: dict[str, Callable[..., transformers.PretrainedConfig]] = {
    "llama": partial(transformers.LlamaConfig, vocab_size=384, rope_parameters=STRETCHED, rms_norm_eps=1e-5),
    "mistral": partial(transformers.MistralConfig, vocab_size=384, rope_parameters=PLAIN, sliding_window=WINDOW),
    "qwen2": partial(transformers.Qwen2Config, vocab_size=400, rope_parameters=PLAIN),
    "qwen3": partial(transformers.Qwen3Config, vocab_size=384, rope_parameters=PLAIN, tie_word_embeddings=True),
}


Answer = tuple[np.ndarray, list[int]]  # log-probabilities [T, V] of the ids given, and the greedy ids after them


@dataclass(frozen=True)
class Pair:
    """A model as it was and the folder that was made of it; `ids` is a text for it, `answer` what transformers said."""

    name: str
    original: Path
    folder: Path
    ids: list[int]
    answer: Answer


def ask_transformers(folder: Path, ids: Sequence[int]) -> Answer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = torch.tensor(ids)[None]
    with torch.no_grad():
        logits = model(rows).logits[0].double()
    greedy = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=NEW, do_sample=False)
    return logits.log_softmax(-1).numpy(), greedy[0, len(ids) :].tolist()


def ask_ctranslate2(folder: Path, ids: Sequence[int], place: Path) -> Answer:
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(place))
    model = ctranslate2.Generator(str(place), device="cpu", compute_type="float32", inter_threads=1, intra_threads=1)
    scores = np.array(model.forward_batch([list(ids)], return_log_probs=True))[0]
    tokens = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(list(ids))
    options = {"max_length": NEW, "sampling_topk": 1, "include_prompt_in_result": False, "return_end_token": True}
    return scores, list(model.generate_batch([tokens], **options)[0].sequences_ids[0])


def ask_mlx(folder: Path, ids: Sequence[int], place: Path) -> Answer:
    mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    mx.set_default_device(mx.cpu)
    model, tokenizer = mlx_lm.load(str(folder))
    logits = np.array(model(mx.array(list(ids))[None]))[0]
    steps = mlx_lm.stream_generate(model, tokenizer, list(ids), max_tokens=NEW)  # ends at the folder's own stop ids
    return torch.tensor(logits).double().log_softmax(-1).numpy(), [step.token for step in steps]


JUDGES = {"ctranslate2": ask_ctranslate2, "mlx": ask_mlx}


def save_random(folder: Path, name: str, tokenizer: Path) -> None:
    """Write a random model in which no weight, norms and biases included, is like another."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**SIZES))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.3 * torch.randn_like(weight)
    model.save_pretrained(folder)
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


@pytest.fixture(scope="session", params=[*CONFIGS, "stories260K"])
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Tokenizer,
    qwen_tokenizer: Tokenizer,
) -> Pair:
    place, name = tmp_path_factory.mktemp(request.param), str(request.param)
    if name == "stories260K":  # a tied LLaMA
        original = request.getfixturevalue("shared_data") / "models" / "stories260K-hf"
        ids = AutoTokenizer.from_pretrained(original)("Once upon a time, there was a little girl named Lily.").input_ids
    else:
        original = place / "original"
        (place / "tokenizer").mkdir()
        (qwen_tokenizer if name == "qwen2" else tokenizer).save(place / "tokenizer")
        save_random(original, name, place / "tokenizer")
        ids = np.random.default_rng(3).integers(3, 300, 50).tolist()
    convert("to-hf", original, place / "folder")
    return Pair(name, original, place / "folder", ids, ask_transformers(original, ids))


def test_transformers_computes_what_the_original_computed(pair: Pair) -> None:
    wanted, greedy = pair.answer
    scores, ids = ask_transformers(pair.folder, pair.ids)
    assert np.abs(scores - wanted).max() <= 1e-4 * wanted.std()
    assert ids == greedy


@pytest.mark.parametrize("judge", JUDGES)
def test_other_engines_compute_what_the_original_computed(pair: Pair, judge: str, tmp_path: Path) -> None:
    if (pair.name, judge) == ("llama", "ctranslate2"):
        pytest.skip("CTranslate2's converter (4.8.5) loses the factor of Llama 3.1's RoPE, of the original too")
    prompt, (wanted, greedy) = pair.ids, pair.answer
    if pair.name == "mistral":  # neither engine cuts a prompt to the window
        prompt = pair.ids[: WINDOW - NEW]
        wanted, greedy = ask_transformers(pair.original, prompt)
    scores, ids = JUDGES[judge](pair.folder, prompt, tmp_path / "converted")
    assert np.abs(scores - wanted).max() <= 1e-3
    assert ids == greedy
    assert wanted.std() > 0.5
    assert len(set(ids)) > 1
