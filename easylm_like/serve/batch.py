"""The rows that are decoded together: who sits where, and the arrays on the devices that follow from it.

Everything on the devices but the cache is made anew from the jobs whenever one joins or leaves; in between, the devices
feed themselves, and a step is started before the tokens of the one before it have come back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from easylm_like.serve.choose import History, Settings, gather_settings
from easylm_like.serve.decoder import Decoder, Scores, no_history
from easylm_like.serve.forward import Cache
from easylm_like.serve.job import Job
from easylm_like.serve.request import Sampling, TokenLogprob

HostScores = tuple[np.ndarray, np.ndarray, np.ndarray]  # Scores that are back from the devices
PATIENCE = 8  # steps for which a smaller cache must be enough before it is made


@dataclass(slots=True)
class Flight:
    """A step that was started: its tokens are on the way. `rows` says whose they are."""

    tokens_B: jax.Array
    scores: Scores | None
    rows: list[Job | None]

    def read(self) -> tuple[np.ndarray, HostScores | None]:
        """Wait for the devices."""
        if self.scores is None:
            return np.asarray(self.tokens_B), None
        own, top, ids = map(np.asarray, self.scores)
        return np.asarray(self.tokens_B), (own, top, ids)


@dataclass(slots=True)
class Batch:
    """The jobs that are being decoded, their shared cache, and the step that is on its way."""

    decoder: Decoder
    jobs: list[Job] = field(default_factory=list)
    cache: Cache | None = None
    flight: Flight | None = None
    steps: int = 0
    _tokens_B: jax.Array | None = None
    _lengths_B: jax.Array | None = None
    _settings: Settings | None = None
    _history: History | None = None
    _changed: bool = True
    _roomy: int = 0

    def join(self, job: Job) -> None:
        """Add a job whose prompt is read and whose first token is known."""
        self.jobs.append(job)
        self._changed = True

    def leave(self, job: Job) -> Cache | None:
        """Take a job out and return a copy of its cache row."""
        self.jobs.remove(job)
        self._changed = True
        if job.slot is None or self.cache is None:
            return job.row
        return self.decoder.extract(self.cache, job.slot, self.decoder.buckets.length(job.held))

    def copy_of(self, job: Job, length: int) -> Cache | None:
        """Return a copy of the row of a job in the batch, or None while it has none there."""
        if job.slot is None or self.cache is None:
            return None
        return self.decoder.extract(self.cache, job.slot, length)

    def advance(self) -> Flight | None:
        """Start the next step and return the one before it, whose tokens are to be read now."""
        wanted = [job for job in self.jobs if job.asked < job.limit]
        if not wanted or self._must_rebuild():
            if self.flight is not None:
                return self._land()
            if not wanted:
                return None
            self._rebuild()
        before, self.flight = self.flight, self._start()
        return before

    def reset(self) -> None:
        """Forget everything, after a failure."""
        self.jobs.clear()
        self.cache = self.flight = self._tokens_B = self._lengths_B = None
        self._changed = True

    def _land(self) -> Flight | None:
        flight, self.flight = self.flight, None
        return flight

    def _must_rebuild(self) -> bool:
        if self._changed or self.cache is None:
            return True
        rows, length = self._size()
        if length > self.cache.length:
            return True
        smaller = rows < self.cache.rows or length < self.cache.length
        self._roomy = self._roomy + 1 if smaller else 0
        return self._roomy > PATIENCE

    def _size(self) -> tuple[int, int]:
        buckets = self.decoder.buckets
        return buckets.batch(len(self.jobs)), buckets.length(max(job.held for job in self.jobs) + 1)

    def _rebuild(self) -> None:
        """Seat every job, in another cache if that must grow or may shrink, and write down who is where."""
        rows, length = self._size()
        old = self.cache
        if old is not None and self._roomy <= PATIENCE and any(job.slot is not None for job in self.jobs):
            rows, length = max(rows, old.rows), max(length, old.length)
        self._roomy = 0
        if old is None or (old.rows, old.length) != (rows, length):
            self._move(old, rows, length)
        assert self.cache is not None
        free = iter(sorted(set(range(rows)) - {job.slot for job in self.jobs}))
        for job in self.jobs:
            if job.slot is None:
                assert job.row is not None
                job.slot = next(free)
                self.cache, job.row = self.decoder.insert(self.cache, job.row, job.slot), None
        self._write_down(self._seats())
        self._changed = False

    def _move(self, old: Cache | None, rows: int, length: int) -> None:
        new = self.decoder.empty(rows, length)
        slot = 0
        for job in self.jobs:
            if job.slot is not None and old is not None:
                row = self.decoder.extract(old, job.slot, self.decoder.buckets.length(job.held))
                new, job.slot = self.decoder.insert(new, row, slot), slot
                slot += 1
        self.cache = new

    def _seats(self) -> list[Job | None]:
        assert self.cache is not None
        by_slot = {job.slot: job for job in self.jobs}
        return [by_slot.get(slot) for slot in range(self.cache.rows)]

    def _write_down(self, seats: Sequence[Job | None]) -> None:
        decoder = self.decoder
        self._tokens_B = decoder.integers([job.answer[-1] if job else 0 for job in seats])
        self._lengths_B = decoder.integers([job.held if job else 0 for job in seats])
        samplings = [job.request.sampling if job else Sampling() for job in seats]
        self._settings = self._history = None
        if not all(sampling.greedy for sampling in samplings):
            self._settings = decoder.place(gather_settings(samplings))
        if any(sampling.penalised for sampling in samplings):
            self._history = decoder.place(history_of(seats, decoder.config.vocab_size))

    def _start(self) -> Flight:
        assert self.cache is not None
        assert self._tokens_B is not None
        assert self._lengths_B is not None
        decoder, seats = self.decoder, self._seats()
        logits_BV, self._lengths_B, self.cache = decoder.step(self.cache, self._tokens_B, self._lengths_B)
        self._tokens_B, self._history = decoder.choose(logits_BV, self._settings, self._history, self._lengths_B)
        asked = any(job.request.top_logprobs is not None for job in self.jobs)
        scores = decoder.logprobs(logits_BV, self._tokens_B) if asked else None
        for job in self.jobs:
            job.held += 1
            job.asked += 1
        self.steps += 1
        return Flight(self._tokens_B, scores, seats)


def history_of(seats: Sequence[Job | None], vocab_size: int) -> History:
    """Return what penalties need to know of each row, on the host."""
    history = no_history(len(seats), vocab_size)
    for row, job in enumerate(seats):
        if job is not None and job.request.sampling.penalised:
            for token, bias in job.request.sampling.logit_bias.items():
                history.bias_BV[row, token] = bias
            history.prompt_BV[row] = np.bincount(job.request.prompt, minlength=vocab_size)
            history.answer_BV[row] = np.bincount(job.answer, minlength=vocab_size)
    return history


def read_logprobs(scores: HostScores, row: int, token: int, alternatives: int) -> TokenLogprob:
    """Return the log-probability of a token, with so many of the likeliest beside it."""
    own, top, ids = scores
    pairs = zip(ids[row, :alternatives].tolist(), top[row, :alternatives].tolist(), strict=True)
    return TokenLogprob(token, float(own[row]), tuple(pairs))
