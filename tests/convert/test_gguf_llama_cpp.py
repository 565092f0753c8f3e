"""llama.cpp, which this project did not write, reads the GGUF files: ids, log-probabilities, greedy text."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xllamacpp

HARD = [
    "",
    " ",
    "Hello world",
    "  leading, and   runs  of spaces ",
    "\ttabs\t\tand\n\nnew\r\nlines \n x",
    "1234567 3.14 2 + 2 = 4,   12",
    "I'm sure they'LL say it's DON'T",
    "naïve café, ЖЗИ, 你好，世界。東京 한국어 العربية हिन्दी",
    "🚀🙂😶‍🌫️ ▁ Ġ",
    "def f(x):\n    return x**2  # ok\n\n\n<|x|> </b> [PAD3] <0x0A>",
    "0_1;aB-C--D...?!?!{}()[]<>@#$%^&*~`|\\/",
]


@dataclass(frozen=True)
class LlamaCpp:
    """A model in llama.cpp's server."""

    url: str

    def post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, text: str, *, bos: bool = False) -> list[int]:
        body = {"content": text, "add_special": bos, "parse_special": True}
        return self.post("/tokenize", body)["tokens"]

    def generate(self, ids: list[int], count: int, vocab: int) -> tuple[list[int], np.ndarray]:
        """Return greedy ids [T] and the log-probabilities of every id that each was chosen from [T, V]."""
        body = {"prompt": ids, "n_predict": count, "temperature": 0.0, "n_probs": vocab, "cache_prompt": False}
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
