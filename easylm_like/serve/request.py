"""What an engine is asked and what it answers: the contract with whoever asks (HTTP, terminal, evaluation)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from easylm_like.errors import UserError

MOST_ALTERNATIVES = 20  # likeliest tokens that can be asked for at every place, OpenAI's limit for top_logprobs


class Busy(UserError):
    """The queue is full: the same request may be sent again later."""


class Closing(UserError):
    """The engine takes no more requests."""


class Finish(StrEnum):
    """Why an answer ended, in OpenAI's words where it has one."""

    STOP = "stop"  # the end-of-answer token, or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen, per request. The defaults are greedy.

    In this order, as in transformers: `repetition_penalty` r divides positive logits (multiplies negative ones) of
    tokens that occur in prompt or answer by r (CTRL, arXiv 1909.05858); `presence_penalty` and `frequency_penalty` are
    taken off the logits of tokens of the answer, once and per occurrence (OpenAI's reference); `logit_bias` is added;
    `temperature` divides (0: the likeliest); `top_k` keeps the k likeliest (0: all), `top_p` the nucleus (arXiv
    1904.09751), `min_p` what is at least min_p times as likely as the likeliest (arXiv 2407.01082). The draw depends on
    `seed` and the place in the text alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Return whether nothing but the largest logit of the model decides."""
        return self.temperature == 0 and not self.penalised

    @property
    def penalised(self) -> bool:
        """Return whether the logits are changed before a token is chosen."""
        plain = self.repetition_penalty == 1 and self.presence_penalty == 0 and self.frequency_penalty == 0
        return not plain or bool(self.logit_bias)

    def check(self) -> None:
        """Raise UserError, which names the field, for a value that means nothing."""
        limits = {
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "presence_penalty": -2 <= self.presence_penalty <= 2,
            "frequency_penalty": -2 <= self.frequency_penalty <= 2,
        }
        wanted = {
            "temperature": "0 or more",
            "top_p": "above 0 and at most 1",
            "top_k": "0 (all) or more",
            "min_p": "from 0 to 1",
            "repetition_penalty": "above 0",
            "presence_penalty": "from -2 to 2",
            "frequency_penalty": "from -2 to 2",
        }
        for name, holds in limits.items():
            if not (holds and np.isfinite(getattr(self, name))):
                raise UserError(f"{name} must be {wanted[name]}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One text to continue. `prompt` is int32 [T], T at least 1, all its special tokens in it already.

    `stop` are strings that end the answer and are not part of it; `gap` is removed from its beginning (Template.gap).
    The model's own end-of-answer ids end it too unless `ignore_eos`. `top_logprobs` and `prompt_logprobs` ask for the
    log-probabilities of the answer's and of the prompt's tokens with that many alternatives at each place (0 to
    MOST_ALTERNATIVES; None: no log-probabilities). They are the model's own, before temperature and penalties.
    `max_tokens` 0 scores the prompt only. `timeout` is in seconds, from the moment the request is submitted.
    """

    prompt: np.ndarray
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    gap: str = ""
    ignore_eos: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural log-probability, and the likeliest tokens at its place with theirs, likeliest first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of a request: of the prompt, how many of these came from the cache, and of the answer so far."""

    prompt: int
    cached: int
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The next piece of an answer. `finish` is set in the last one, and only there; `error` says why if it is ERROR.

    `ids` are all tokens that were generated, the end-of-answer id among them; `text` is what they add to the answer,
    without stop strings, without half characters, and held back while it could be the beginning of a stop string.
    `prompt_logprobs` comes once, in the first output: one entry a token of the prompt, None for the first token.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    counts: Counts
    finish: Finish | None = None
    error: str | None = None


Deliver = Callable[[Output], None]  # called on the engine's thread; must not block and must not raise
