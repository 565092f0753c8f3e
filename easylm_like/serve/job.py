"""One request on its way through an engine."""

import time
from dataclasses import dataclass, field

import numpy as np

from easylm_like.serve.forward import Cache
from easylm_like.serve.request import Counts, Deliver, Finish, Output, Request, TokenLogprob
from easylm_like.serve.text import TextStream


@dataclass(slots=True, eq=False)
class Job:
    """A request, how far its prompt is read, and its answer so far.

    `held` is how many of its tokens lie in its cache row: the `row` of its own until it joins the others, then row
    `slot` of the cache that all share. `asked` counts the tokens of the answer that were asked of the devices; they may
    not be back yet.
    """

    ticket: int
    request: Request
    deliver: Deliver
    limit: int  # tokens of the answer
    stream: TextStream
    since: float = field(default_factory=time.monotonic)
    row: Cache | None = None
    slot: int | None = None
    held: int = 0
    cached: int = 0
    asked: int = 0
    answer: list[int] = field(default_factory=list)
    scores: list[TokenLogprob | None] = field(default_factory=list)  # of the prompt
    finish: Finish | None = None

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and answer, int32."""
        return np.concatenate([self.request.prompt, np.array(self.answer, np.int32)])

    @property
    def counts(self) -> Counts:
        """How many tokens there are of what kind."""
        return Counts(len(self.request.prompt), self.cached, len(self.answer))

    def late(self) -> bool:
        """Return whether its time is over."""
        return self.request.timeout is not None and time.monotonic() - self.since > self.request.timeout

    def take(self, token: int, logprob: TokenLogprob | None, stop_ids: tuple[int, ...]) -> bool:
        """Add a token to the answer and deliver what is certain; return whether that ended it."""
        self.answer.append(token)
        if token in stop_ids and not self.request.ignore_eos:
            self.finish, text = Finish.STOP, ""
        else:
            text = self.stream.push(token)
            if self.stream.stopped:
                self.finish = Finish.STOP
            elif len(self.answer) >= self.limit:
                self.finish = Finish.LENGTH
        self._deliver(text, (token,), (logprob,) if logprob else ())
        return self.finish is not None

    def end(self, finish: Finish, error: str | None = None) -> None:
        """Deliver the last output of an answer that no token ended."""
        self.finish = finish
        self._deliver("", (), (), error)

    def _deliver(
        self, text: str, ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...], error: str | None = None
    ) -> None:
        if self.finish is not None and not self.stream.stopped:
            text += self.stream.finish()
        scores, self.scores = tuple(self.scores), []
        output = Output(
            text=text,
            ids=ids,
            logprobs=logprobs,
            prompt_logprobs=scores or None,
            counts=self.counts,
            finish=self.finish,
            error=error,
        )
        self.deliver(output)
