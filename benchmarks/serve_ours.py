"""This project's engine as a contestant of benchmarks/serve.py.

python -m benchmarks.serve_ours CASE
"""

import dataclasses
import threading
import time
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from benchmarks.serve_case import Case, Task, answer, decoded, load_case
from easylm_like.convert.load import OpenModel, open_model
from easylm_like.data.tokenizer import load_tokenizer
from easylm_like.hf.card import count_parameters
from easylm_like.hf.keys import their_shapes, to_ours
from easylm_like.hf.tensors import Tensor
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.model.presets import get_preset
from easylm_like.serve.engine import Engine, EngineConfig
from easylm_like.serve.request import Output, Request

BLOCK = 1_000_003  # random numbers that are drawn and then repeated: 8B would take minutes; prime, so rows differ


def main() -> None:
    """Load the model of the command line and decode when told to."""
    case = load_case()
    answer(lambda: start(case))


def start(case: Case) -> tuple[dict[str, object], Mapping[str, Task]]:
    """Return what there is to say about the engine, and what it can be asked."""
    begun, marks = time.perf_counter(), list[float]()
    model = random_model(case) if case.preset else open_model(case.model)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    config = EngineConfig(slots=case.slots, context=case.context, dtype=case.dtype, int8=case.int8)
    engine = Engine(
        model, mesh, config, say=lambda _: marks.append(time.perf_counter())
    )  # "reading", then what it compiles
    info: dict[str, object] = {
        "vocab": model.config.vocab_size,
        "weights": count_parameters(model.config),
        "context": engine.context,
        "device": jax.devices()[0].device_kind,
        "load": marks[1] - begun,
        "warm": time.perf_counter() - marks[1],
    }
    tasks: dict[str, Task] = {
        "decode": lambda prompts, new: decode(engine, prompts, new),
        "score": lambda texts: score(engine, texts),
        "compilations": lambda: engine.snapshot().compilations,
        "device_mib": device_mib,
    }
    return info, tasks


def decode(engine: Engine, prompts: list[list[int]], new: int) -> dict[str, object]:
    """Answer all prompts at once, each with `new` tokens. The engine's thread only notes what came, and when."""
    came: list[list[tuple[float, Output]]] = [[] for _ in prompts]
    begun = time.perf_counter()
    _ask(engine, [Request(prompt=np.array(p, np.int32), max_tokens=new, ignore_eos=True) for p in prompts], came)
    first = max(row[0][0] for row in came)
    end = max(row[-1][0] for row in came)
    after = sum(len(output.ids) for row in came for at, output in row if at > first)
    ids = [[token for _, output in row for token in output.ids] for row in came]
    return decoded(ids, first - begun, end - begun, after)


def score(engine: Engine, texts: list[list[int]]) -> list[list[float]]:
    """Return of every text the log-probabilities of its tokens, in nats, but of the first."""
    came: list[list[tuple[float, Output]]] = [[] for _ in texts]
    for start in range(0, len(texts), engine.slots):
        some = texts[start : start + engine.slots]
        requests = [Request(prompt=np.array(t, np.int32), max_tokens=0, prompt_logprobs=0) for t in some]
        _ask(engine, requests, came[start : start + engine.slots])
    scores = [output.prompt_logprobs or () for ((_, output),) in came]
    return [[entry.logprob for entry in row if entry is not None] for row in scores]


def _ask(engine: Engine, requests: list[Request], came: list[list[tuple[float, Output]]]) -> None:
    """Submit together, fill `came` with what comes of each, and return when all have ended."""
    ended = threading.Semaphore(0)

    def deliver(row: int, output: Output) -> None:
        came[row].append((time.perf_counter(), output))
        if output.finish is not None:
            ended.release()

    for number, request in enumerate(requests):
        engine.submit(request, partial(deliver, number))
    for _ in requests:
        ended.acquire()
    if failed := [row[-1][1].error for row in came if row[-1][1].error]:
        raise RuntimeError(failed[0])


def random_model(case: Case) -> OpenModel:
    """Return a preset whose weights are drawn when they are read: bfloat16, norms around 1, the rest around 0."""
    shape = get_preset(case.preset)
    shape = dataclasses.replace(shape, n_layers=case.layers or shape.n_layers)
    block = np.random.default_rng(0).standard_normal(BLOCK, np.float32) * 0.02
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def tensor(sizes: tuple[int, ...]) -> Tensor:
        rounded = (block + (len(sizes) == 1)).astype(bfloat16)
        return Tensor(sizes, bfloat16, lambda: np.resize(rounded, prod(sizes)).reshape(sizes))

    tensors = {name: tensor(sizes) for name, sizes in their_shapes(shape).items()}
    tokenizer = load_tokenizer(case.tokenizer)
    return OpenModel(
        path=Path(case.preset),
        config=shape,
        stacks=to_ours(tensors, shape, case.preset),
        tensors=tensors,
        tokenizer=tokenizer,
        template=None,
        chat_template=None,
        stop_ids=(tokenizer.eos_id,),
    )


def device_mib() -> float | None:
    """Return the greatest memory of the accelerator, None on a CPU."""
    stats = jax.devices()[0].memory_stats() if jax.devices()[0].platform != "cpu" else None
    return stats["peak_bytes_in_use"] / 2**20 if stats else None


if __name__ == "__main__":
    main()
