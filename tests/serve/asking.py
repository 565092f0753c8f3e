"""Asking an engine from a test: submit requests together, wait for all, and join each one's outputs."""

import queue
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from easylm_like.serve.engine import Engine
from easylm_like.serve.request import Finish, Output, Request, TokenLogprob

SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Answered:
    """All outputs of a request, joined."""

    outputs: tuple[Output, ...]

    @property
    def ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.ids]

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [one for output in self.outputs for one in output.logprobs]

    @property
    def last(self) -> Output:
        return self.outputs[-1]

    @property
    def finish(self) -> Finish | None:
        return self.last.finish


def collect(inbox: "queue.SimpleQueue[Output]") -> Answered:
    outputs = [inbox.get(timeout=SECONDS)]
    while outputs[-1].finish is None:
        outputs.append(inbox.get(timeout=SECONDS))
    return Answered(tuple(outputs))


def ask(engine: Engine, requests: Sequence[Request]) -> list[Answered]:
    """Submit all requests at once and return their answers, in order."""
    inboxes: list[queue.SimpleQueue[Output]] = [queue.SimpleQueue() for _ in requests]
    for request, inbox in zip(requests, inboxes, strict=True):
        engine.submit(request, inbox.put)
    return [collect(inbox) for inbox in inboxes]


def ask_one(engine: Engine, prompt: np.ndarray, max_tokens: int = 16, **others: object) -> Answered:
    return ask(engine, [Request(prompt=prompt, max_tokens=max_tokens, **others)])[0]
