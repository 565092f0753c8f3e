"""llama.cpp, which this project did not write, reads the GGUF files: ids, log-probabilities, greedy text."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
import xllamacpp

from easylm_like.convert.gguf.read import open_gguf
from easylm_like.convert.gguf.tokenizer import CUTS
from easylm_like.convert.gguf.write import About, GgufType, write_gguf
from easylm_like.convert.source import Hints
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.hf.config import config_from_hf
from easylm_like.hf.tensors import as_tensor

HARD = [
    "",
    " ",
    "Hello world",
    "  leading, and   runs  of spaces ",
    "\ttabs\t\tand\n\nnew\r\nlines \n x",
    "1234567 3.14 2 + 2 = 4,   12",
    "I'm sure they'LL say it's DON'T",
    "naïve café, ЖЗИ, 你好。東京 한국어 العربية हिन्दी",
    "🚀🙂😶‍🌫️ ▁ Ġ",
    "def f(x):\n    return x**2  # ok\n\n\n<|x|> </b> [PAD3] <0x0A>",
    "0_1;aB-C--D...?!?!{}()[]<>@#$%^&*~`|\\/",
]


@dataclass(frozen=True)
class LlamaCpp:
    """A model in llama.cpp's server."""

    url: str

    def post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, text: str, *, bos: bool = False) -> list[int]:
        body = {"content": text, "add_special": bos, "parse_special": True}
        return self.post("/tokenize", body)["tokens"]

    def generate(
        self, ids: list[int], count: int, vocab: int, allowed: range | None = None
    ) -> tuple[list[int], np.ndarray]:
        """Return greedy ids [T], of `allowed` ones, and the log-probabilities of all before each choice [T, V]."""
        body = {"prompt": ids, "n_predict": count, "temperature": 0.0, "n_probs": vocab, "cache_prompt": False}
        if allowed is not None:  # the server's steps are texts: bytes that are no whole character yet would be none
            body["logit_bias"] = [[i, False] for i in range(vocab) if i not in allowed]
        steps = self.post("/completion", body)["completion_probabilities"]
        table = np.full((len(steps), vocab), np.nan)
        for row, step in enumerate(steps):
            for choice in step["top_logprobs"]:
                table[row, choice["id"]] = choice["logprob"]
        return [step["id"] for step in steps], table


@contextmanager
def llama_cpp(path: Path) -> Iterator[LlamaCpp]:
    """Serve a file, with a cache in fp32, so that rounding of its own does not hide a mistake of ours."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 256, 1, False, -1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cpuparams.n_threads = 2
    server = xllamacpp.Server(parameters)
    yield LlamaCpp(server.listening_address)
    del server


def byte_level(cut: str, folder: Path) -> Tokenizer:
    """Train a byte-level BPE tokenizer that cuts text as `cut` does, by the tokenizers library."""
    way, takes_whole_tokens = CUTS[cut], cut == "llama-bpe"
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    fields = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": way.normalizer,
        "pre_tokenizer": way.pre_tokenizer,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": takes_whole_tokens},
    }
    backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|x|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(HARD * 5, trainer)
    fields = json.loads(backend.to_str())
    if takes_whole_tokens:  # pieces that only the vocabulary has, as Llama 3's has
        fields["model"]["merges"] = fields["model"]["merges"][:-60]
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|x|>", "eos_token": "<|end|>"}))
    return load_tokenizer(folder)


def random_model(kind: str, vocab: int, **changes: object) -> transformers.PreTrainedModel:
    """Return a small model of transformers with weights, norms and biases that are all drawn."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": vocab, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes, **changes))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.2)
    return model


def write(model: transformers.PreTrainedModel, tokenizer: Tokenizer, path: Path, kind: GgufType) -> Path:
    tied = ("lm_head.weight",) if model.config.tie_word_embeddings else ()
    tensors = {n: as_tensor(w.detach().float().numpy()) for n, w in model.state_dict().items() if n not in tied}
    config = config_from_hf(model.config.to_dict(), "a model of transformers")
    write_gguf(path, config, tensors, tokenizer, kind=kind, about=About("random"))
    return path


def log_probabilities(model: transformers.PreTrainedModel, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Return transformers' log-probabilities of every id at the places of `answer` [T, V]."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    kind, changes = MODELS[name]
    changes = {"head_dim": 16} | changes
    model = random_model(kind, 400, **changes)
    prompt = np.random.default_rng(1).integers(3, 384, 90).tolist()
    with llama_cpp(write(model, tokenizer, tmp_path / "m.gguf", GgufType.F32)) as server:
        answer, table = server.generate(prompt, 12, 400, range(259, 384))
    wanted = log_probabilities(model, prompt, answer)
    assert len(answer) == 12
    assert answer == (259 + wanted[:, 259:384].argmax(axis=1)).tolist()
    np.testing.assert_allclose(table, wanted, atol=1e-3)


@pytest.mark.parametrize("cut", CUTS)
def test_byte_level_ids_are_llama_cpps_and_come_back(cut: str, tmp_path: Path) -> None:
    tokenizer = byte_level(cut, tmp_path)
    path = write(random_model("llama", 720), tokenizer, tmp_path / "m.gguf", GgufType.F16)
    wanted = [ids.tolist() for ids, _ in tokenizer.encode(HARD)]
    back = open_gguf(path, Hints()).tokenizer
    assert back is not None
    assert [ids.tolist() for ids, _ in back.encode(HARD)] == wanted
    with llama_cpp(path) as server:
        assert [server.ids(text) for text in HARD] == wanted


def test_sentencepiece_ids_are_llama_cpps_and_come_back(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "llama_tokenizer.model")
    path = write(random_model("llama", 32016), tokenizer, tmp_path / "m.gguf", GgufType.F16)
    texts = [text.replace("<|x|>", "</s>") for text in HARD]
    wanted = [ids.tolist() for ids, _ in tokenizer.encode(texts)]
    back = open_gguf(path, Hints()).tokenizer
    assert back is not None
    assert back.digest == tokenizer.digest
    with llama_cpp(path) as server:
        assert [server.ids(text) for text in texts[1:]] == wanted[1:]
        assert server.ids("Hi", bos=True)[0] == tokenizer.bos_id


# What llama.cpp rounds itself: activations to f16, bf16, or to 8 bits, before it multiplies with such weights.
OWN_ROUNDING = {GgufType.F32: 1e-3, GgufType.F16: 1e-2, GgufType.BF16: 5e-2, GgufType.Q8_0: 3e-1}


@pytest.mark.parametrize("kind", OWN_ROUNDING)
def test_llama_cpp_tells_the_same_story(kind: GgufType, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "models" / "stories260K-hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    path = write(model, tokenizer, tmp_path / "m.gguf", kind)
    stored = open_gguf(path, Hints()).tensors.items()
    weights = {name: torch.tensor(tensor.read().astype(np.float32)) for name, tensor in stored}
    model.load_state_dict(weights, strict=False)  # strict would want the tied head too
    prompt = [1, *tokenizer.encode(["Once upon a time, there was a little girl named Lily."])[0][0].tolist()]
    with llama_cpp(path) as server:
        answer, table = server.generate(prompt, 60, 512)
    wanted = log_probabilities(model, prompt, answer)
    assert len(answer) == 60
    assert answer == wanted.argmax(axis=1).tolist()
    likely = wanted > np.log(1e-3)
    assert np.abs(table - wanted)[likely].max() < OWN_ROUNDING[kind]
