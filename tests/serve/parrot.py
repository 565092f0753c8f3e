"""A chat in a terminal with an engine that repeats its prompt, or does what the question says: a program for tests."""

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from easylm_like.command import run_command
from easylm_like.data.template import SpecialTokens, get_template
from easylm_like.serve.request import Counts, Deliver, Finish, Output, Request
from easylm_like.serve.terminal import chat

BYTES = SimpleNamespace(
    special=SpecialTokens(None, "</s>"),
    encode=lambda texts: [(np.frombuffer(text.encode(), np.uint8).astype(np.int32),) for text in texts],
)

BEGIN = get_template("koala").begin


@dataclass
class Parrot:
    """Writes a word at a time; its tokens are bytes."""

    template: object
    tokenizer: object = field(default_factory=lambda: BYTES)
    chat_template: None = None
    context: int = 400
    cancelled: set[int] = field(default_factory=set)

    def submit(self, request: Request, deliver: Deliver) -> int:
        ticket = id(request)
        threading.Thread(target=self._answer, args=(ticket, request, deliver), daemon=True).start()
        return ticket

    def cancel(self, ticket: int) -> None:
        self.cancelled.add(ticket)

    def _answer(self, ticket: int, request: Request, deliver: Deliver) -> None:
        said = 0
        prompt = bytes(request.prompt.astype(np.uint8)).decode()
        for word in self._words(prompt, request):
            if ticket in self.cancelled:
                deliver(Output(counts=Counts(len(prompt), 0, said), finish=Finish.CANCELLED))
                return
            said += 1
            deliver(Output(text=word, ids=(1,), counts=Counts(len(prompt), 3, said)))
        broken = "BREAK" in prompt
        counts = Counts(len(prompt), 3, said)
        finish = Finish.ERROR if broken else Finish.LENGTH if request.max_tokens == 1 else Finish.STOP
        deliver(Output(counts=counts, finish=finish, error="out of memory" if broken else None))

    def _words(self, prompt: str, request: Request) -> Iterator[str]:
        question = prompt.rpartition("USER: ")[2]
        if question.startswith("SLOW"):
            for number in range(1000):
                yield f"{number} "
                time.sleep(0.01)
        elif question.startswith("HOSTILE"):
            yield "\x1b[31mred\x1b[0m \u202e \x07"
        elif question.startswith("SAMPLING"):
            sampling = request.sampling
            yield f"{sampling.temperature} {sampling.top_k} {sampling.seed} {request.max_tokens}"
        else:
            yield from (f"{word} " for word in prompt.removeprefix(BEGIN).replace("</s>", "| ").split())


if __name__ == "__main__":
    run_command(lambda argv: chat(Parrot(get_template(argv[0]))), sys.argv[1:])
