"""An engine that does what a test says: it writes one text, at a pace, until it is stopped or breaks."""

import threading
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from easylm_like.data.template import Template
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.serve.request import Busy, Closing, Counts, Deliver, Finish, Output, Request, TokenLogprob


@dataclass
class ToyEngine:
    """Says `text`, a letter (`width` times) and a token each `pace` seconds, to `room` requests, up to `breaks`."""

    tokenizer: Tokenizer
    template: Template | None = None
    chat_template: str | None = None
    text: str = "One day, a little girl named Lily was playing."
    width: int = 1
    pace: float = 0.0
    room: int = 8
    breaks: int | None = None
    context: int = 512
    alive: bool = True
    ready: bool = True
    closing: bool = False
    asked: list[Request] = field(default_factory=list)
    live: dict[int, threading.Event] = field(default_factory=dict)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_id,)

    def submit(self, request: Request, deliver: Deliver) -> int:
        if self.closing:
            raise Closing("the engine is closing")
        if len(self.live) >= self.room:
            raise Busy("the queue is full")
        self.asked.append(request)
        ticket, stop = len(self.asked), threading.Event()
        self.live[ticket] = stop
        threading.Thread(target=self._answer, args=(ticket, request, deliver, stop), daemon=True).start()
        return ticket

    def cancel(self, ticket: int) -> None:
        if ticket in self.live:
            self.live[ticket].set()

    def close(self, grace: float = 0.0) -> None:
        self.closing, end = True, time.monotonic() + grace
        while self.live:
            if time.monotonic() >= end:
                for ticket in list(self.live):
                    self.cancel(ticket)
            time.sleep(0.005)

    def snapshot(self) -> SimpleNamespace:
        numbers = dict.fromkeys(("queued", "prompt_tokens", "cached_tokens", "answer_tokens", "steps"), 0)
        finished = {Finish.STOP: len(self.asked) - len(self.live)}
        return SimpleNamespace(
            slots=4, running=len(self.live), compilations=0, cache_bytes=1024, finished=finished, **numbers
        )

    def _answer(self, ticket: int, request: Request, deliver: Deliver, stop: threading.Event) -> None:
        ids = self.tokenizer.encode([self.text])[0][0].tolist()
        end = time.monotonic() + (request.timeout or 1e9)
        counts, finish = Counts(len(request.prompt), 0, 0), Finish.LENGTH
        told: list[TokenLogprob | None] | None = None
        if request.prompt_logprobs is not None:
            told = [None, *(TokenLogprob(int(id_), -1.0, ((int(id_), -1.0),)) for id_ in request.prompt[1:])]
        for number in range(min(request.max_tokens, self.context - len(request.prompt))):
            if stop.wait(self.pace) or number == self.breaks or time.monotonic() > end:
                finish = (
                    Finish.CANCELLED if stop.is_set() else Finish.ERROR if number == self.breaks else Finish.TIMEOUT
                )
                break
            id_ = ids[number % len(ids)]
            counts = replace(counts, answer=number + 1)
            logprobs = () if request.top_logprobs is None else (TokenLogprob(id_, -0.5, ((id_, -0.5),)),)
            text = self.text[number % len(self.text)] * self.width
            deliver(Output(text=text, ids=(id_,), logprobs=logprobs, prompt_logprobs=told, counts=counts))
            told = None
        self.live.pop(ticket)
        error = "out of memory" if finish == Finish.ERROR else None
        deliver(Output(counts=counts, prompt_logprobs=told, finish=finish, error=error))
