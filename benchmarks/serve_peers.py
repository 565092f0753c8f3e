"""The peers of benchmarks/serve.py: transformers' generate and llama.cpp's server, on the same weights in fp32.

python -m benchmarks.serve_peers CASE transformers|llama.cpp
"""

import json
import sys
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from benchmarks.serve_case import Case, Task, answer, decoded, load_case


def main() -> None:
    """Load the model of the command line and decode when told to."""
    case, peer = load_case(), sys.argv[2]
    answer(lambda: {"transformers": start_transformers, "llama.cpp": start_llama_cpp}[peer](case))


def start_transformers(case: Case) -> tuple[dict[str, object], Mapping[str, Task]]:
    """Read the model into torch; greedy generate, without an end-of-answer id, so that every answer is full.

    That is what min_new_tokens is for, but the processor it adds would cost time, and would forbid an id.
    """
    begun = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(case.threads)
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    class Clock:
        """A streamer: generate tells it the prompt, then the tokens of every step."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def decode(prompts: list[list[int]], new: int) -> dict[str, object]:
        clock, begun = Clock(), time.perf_counter()
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, streamer=clock
            )
        _, first, *rest = clock.times
        end = rest[-1] if rest else first
        answers = found[:, ids.shape[1] :].tolist()
        return decoded(answers, first - begun, end - begun, len(prompts) * len(rest))

    def gap(ids: list[int], one: int, other: int) -> float:
        """Return by how much the logit of token `one` after `ids` is above that of `other`."""
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        return float(logits[one] - logits[other])

    return {"load": time.perf_counter() - begun, "warm": 0.0}, {"decode": decode, "gap": gap}


def start_llama_cpp(case: Case) -> tuple[dict[str, object], Mapping[str, Task]]:
    """Serve the GGUF file in this process, cache in fp32 too; its rate is its own, of all requests together."""
    begun = time.perf_counter()
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = case.gguf
    parameters.n_parallel, parameters.n_ctx, parameters.verbosity = case.slots, case.context * case.slots, -1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = case.threads
    server = xllamacpp.Server(parameters)
    pool = ThreadPoolExecutor(case.slots)

    def complete(prompt: list[int], new: int) -> dict[str, object]:
        body = {"prompt": prompt, "n_predict": new, "temperature": 0.0, "ignore_eos": True}
        body |= {"cache_prompt": False, "return_tokens": True}
        request = urllib.request.Request(
            server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return dict(json.load(reply))

    def decode(prompts: list[list[int]], new: int) -> dict[str, object]:
        begun = time.perf_counter()
        replies = list(pool.map(lambda prompt: complete(prompt, new), prompts))
        whole = time.perf_counter() - begun
        times = [reply["timings"] for reply in replies]
        slowest = max(times, key=lambda one: one["predicted_ms"])["predicted_ms"] / 1000 if new > 1 else 0.0
        after = sum(one["predicted_n"] - 1 for one in times)  # the first one is the prompt's
        return decoded([reply["tokens"] for reply in replies], whole - slowest, whole, after)

    return {"load": time.perf_counter() - begun, "warm": 0.0}, {"decode": decode}


if __name__ == "__main__":
    main()
