"""Decoding for many at once: requests come in from any thread, one thread of the engine's own runs the model.

A request waits in a bounded queue, its prompt is read in chunks between the steps of those that are being answered, and
it joins them in a free slot; what it leaves behind is kept for prompts with the same beginning (continuous batching:
Orca, OSDI 2022; the rest as in vLLM and JetStream, with slots instead of pages).

    engine = Engine(open_model("runs/koala/hf"), mesh, EngineConfig(slots=8))
    ticket = engine.submit(Request(prompt=ids, max_tokens=64), deliver)
"""

import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh

from easylm_like.convert.load import OpenModel
from easylm_like.errors import UserError
from easylm_like.serve.batch import Batch, Flight, history_of, read_logprobs
from easylm_like.serve.choose import gather_settings
from easylm_like.serve.decoder import Compilations, Decoder, choose_buckets
from easylm_like.serve.job import Job
from easylm_like.serve.prefix import SHORTEST, PrefixStore, common_prefix
from easylm_like.serve.request import MOST_ALTERNATIVES, Busy, Closing, Deliver, Finish, Request
from easylm_like.serve.text import TextStream
from easylm_like.serve.weights import load_weights

DEFAULT_CONTEXT = 4096


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """How a model is served.

    `context` 0 is the model's own length, at most 4096. `prefix_gib` bounds what is kept of past texts. With `one_size`
    there is one compiled step for one size and nothing is kept of past texts, so that an answer is the same to the bit
    whatever else is being answered; it costs speed where few requests run.
    """

    slots: int = 8
    context: int = 0
    queue: int = 64
    dtype: str = "auto"
    int8: bool = False
    prefix_gib: float = 1.0
    one_size: bool = False

    def check(self, model_length: int) -> None:
        """Raise UserError for a value that means nothing."""
        if self.slots < 1 or self.queue < 1 or self.prefix_gib < 0:
            raise UserError(f"slots and queue must be at least 1 and prefix_gib 0 or more, got {self}")
        if not 0 <= self.context <= model_length or self.context == 1:
            raise UserError(f"context must be from 2 to the model's length {model_length}, got {self.context}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"dtype must be auto, float32 or bfloat16, got {self.dtype}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What an engine is doing and has done since its start. `compilations` counts programs made after the warm-up."""

    slots: int
    running: int
    queued: int
    finished: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    steps: int
    compilations: int
    cache_bytes: int


@dataclass(slots=True)
class _Totals:
    finished: Counter[str] = field(default_factory=Counter)
    prompt: int = 0
    cached: int = 0
    answer: int = 0


class Engine:
    """A model that answers requests. Every method may be called from any thread."""

    def __init__(
        self,
        model: OpenModel,
        mesh: Mesh,
        config: EngineConfig | None = None,
        *,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Load the model, compile what requests can lead to, and start; `say` is told how far that is.

        Raises:
            UserError: a setting means nothing, or the model is damaged or does not fit the mesh.
        """
        config = config or EngineConfig()
        config.check(model.config.max_length)
        self.config, self.tokenizer, self.stop_ids = model.config, model.tokenizer, model.stop_ids
        self.template, self.chat_template = model.template, model.chat_template
        self.slots, self.queue = config.slots, config.queue
        self.context = config.context or min(model.config.max_length, DEFAULT_CONTEXT)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        dtype = ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
        say(f"reading {model.path}")
        weights = load_weights(model, mesh, dtype=dtype, int8=config.int8)
        buckets = choose_buckets(self.slots, self.context, one_size=config.one_size)
        self._decoder = Decoder(model.config, weights, mesh, buckets, dtype)
        self._decoder.warm_up(say)
        self._compilations: Compilations | None = None
        self._prefixes = PrefixStore(0 if config.one_size else int(config.prefix_gib * 2**30))
        self._batch = Batch(self._decoder)
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._cancelled: set[int] = set()
        self._tickets = 0
        self._closing = self._stopping = False
        self._totals = _Totals()
        self._thread = threading.Thread(target=self._run, name=f"engine {model.path.name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Return whether requests are worked on."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Return whether requests are taken."""
        return self.alive and not self._closing

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Queue a request and return its ticket; `deliver` is called on the engine's thread, at the end with `finish`.

        Raises:
            UserError: the prompt does not fit the context, or something in the request means nothing.
            Busy: the queue is full.
            Closing: no more requests are taken.
        """
        self._check(request)
        limit = min(request.max_tokens, self.context - len(request.prompt))
        stream = TextStream(self.tokenizer, request.prompt[-64:].tolist(), request.stop, request.gap)
        with self._changed:
            if self._closing or not self.alive:
                raise Closing("the server is shutting down; send the request to another one")
            if len(self._waiting) >= self.queue:
                raise Busy(f"{len(self._waiting)} requests are waiting already, the most that may; try again later")
            self._tickets += 1
            self._waiting.append(Job(self._tickets, request, deliver, limit, stream))
            self._changed.notify()
            return self._tickets

    def cancel(self, ticket: int) -> None:
        """End a request before its next step; one that has ended already is left alone."""
        with self._changed:
            self._cancelled.add(ticket)
            self._changed.notify()

    def snapshot(self) -> Snapshot:
        """Return what is going on, for monitoring."""
        with self._changed:
            cache = self._batch.cache
            return Snapshot(
                slots=self.slots,
                running=len(self._reading) + len(self._batch.jobs),
                queued=len(self._waiting),
                finished=dict(self._totals.finished),
                prompt_tokens=self._totals.prompt,
                cached_tokens=self._totals.cached,
                answer_tokens=self._totals.answer,
                steps=self._batch.steps,
                compilations=self._compilations.count if self._compilations else 0,
                cache_bytes=self._prefixes.nbytes + (cache.nbytes if cache else 0),
            )

    def close(self, grace: float = 0.0) -> None:
        """Take no more requests, give those that run `grace` seconds, cancel the rest, and end."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(self._idle, timeout=grace)
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _check(self, request: Request) -> None:
        request.sampling.check()
        prompt, V = request.prompt, self.config.vocab_size
        if not len(prompt):
            raise UserError("the prompt has no token")
        if len(prompt) + min(request.max_tokens, 1) > self.context:
            raise UserError(f"the prompt has {len(prompt)} tokens; with the answer there is room for {self.context}")
        if request.max_tokens < 0 or (request.max_tokens == 0 and request.prompt_logprobs is None):
            raise UserError(f"max_tokens must be at least 1, got {request.max_tokens}")
        if prompt.min() < 0 or prompt.max() >= V:
            raise UserError(f"a prompt's token ids must be from 0 to {V - 1}, got {prompt.min()} to {prompt.max()}")
        if bad := [token for token in request.sampling.logit_bias if not 0 <= token < V]:
            raise UserError(f"logit_bias: token ids must be from 0 to {V - 1}, got {bad[0]}")
        for name in ("top_logprobs", "prompt_logprobs"):
            if (number := getattr(request, name)) is not None and not 0 <= number <= MOST_ALTERNATIVES:
                raise UserError(f"{name} must be from 0 to {MOST_ALTERNATIVES}, got {number}")

    def _idle(self) -> bool:
        return not (self._waiting or self._reading or self._batch.jobs or self._batch.flight)

    def _run(self) -> None:
        self._compilations = Compilations()
        while self._look():
            try:
                self._read_prompts()
                flight = self._batch.advance()
                if flight is not None:
                    self._read_tokens(flight)
            except Exception:  # noqa: BLE001  whatever XLA raises, full memory for one: those who wait must hear of it
                traceback.print_exc(file=sys.stderr)
                self._fail()
        self._compilations.stop()

    def _look(self) -> bool:
        """Take what came in since, wait while there is nothing to do; return whether to go on."""
        with self._changed:
            self._changed.notify_all()
            while self._idle() and not self._stopping:
                self._cancelled.clear()
                self._changed.wait()
            jobs = [*self._waiting, *self._reading, *self._batch.jobs]
            if self._stopping:
                self._cancelled.update(job.ticket for job in jobs)
            ends = {job: Finish.TIMEOUT for job in jobs if job.late()}
            ends |= {job: Finish.CANCELLED for job in jobs if job.ticket in self._cancelled}
            self._cancelled.clear()
        for job, finish in ends.items():
            job.end(finish)
            self._retire(job)
        with self._changed:
            while self._waiting and len(self._reading) + len(self._batch.jobs) < self.slots:
                self._reading.append(self._waiting.popleft())
            return not (self._stopping and self._idle())

    def _read_prompts(self) -> None:
        """Read at most as much of the prompts as the largest chunk holds, so that those who are answered go on."""
        budget = max(self._decoder.buckets.chunks)
        while budget > 0 and self._reading:
            job = self._reading[0]
            if job.row is None:
                self._begin(job)
            before = job.held
            self._read_chunk(job)
            budget -= job.held - before

    def _begin(self, job: Job) -> None:
        """Give a job its row, with what is known of its prompt in it."""
        prompt = job.request.prompt
        length = self._decoder.buckets.length(len(prompt))
        if job.request.prompt_logprobs is None:
            known, row = self._prefixes.find(prompt)
            shared = [(common_prefix(other.tokens[: other.held], prompt), other) for other in self._batch.jobs]
            most, other = max(shared, key=lambda pair: pair[0], default=(0, None))
            if most > max(known, SHORTEST - 1) and other is not None and self._prefixes.limit:
                known, row = most, self._batch.copy_of(other, length) or row
            if row is not None:
                job.row = self._decoder.extract(row, 0, length)
                job.held = job.cached = min(known, len(prompt) - 1)
        if job.row is None:
            job.row = self._decoder.empty(1, length)

    def _read_chunk(self, job: Job) -> None:
        prompt = job.request.prompt
        assert job.row is not None
        x_TD, job.row, first, after = self._decoder.read(job.row, prompt, job.held)
        if job.request.prompt_logprobs is not None:
            self._score(job, x_TD, first, after)
        job.held = after
        if after == len(prompt):
            self._first_token(job, x_TD, len(prompt) - 1 - first)

    def _score(self, job: Job, x_TD: jax.Array, first: int, after: int) -> None:
        """Add the log-probabilities of the prompt's tokens that a chunk predicts."""
        prompt, alternatives = job.request.prompt, job.request.prompt_logprobs
        assert alternatives is not None
        targets = np.zeros(len(x_TD), np.int32)
        known = prompt[first + 1 : first + 1 + len(x_TD)]
        targets[: len(known)] = known
        own, top, ids = map(np.asarray, self._decoder.score(x_TD, targets))
        scores = own, top, ids
        if not job.scores:
            job.scores.append(None)
        for place in range(len(job.scores), min(after, len(prompt) - 1) + 1):
            token = int(prompt[place])
            job.scores.append(read_logprobs(scores, place - 1 - first, token, alternatives))

    def _first_token(self, job: Job, x_TD: jax.Array, index: int) -> None:
        decoder, request = self._decoder, job.request
        self._reading.remove(job)
        self._totals.prompt += len(request.prompt)
        self._totals.cached += job.cached
        assert job.row is not None
        if self._prefixes.limit:
            self._prefixes.add(request.prompt, job.row)
        if request.max_tokens == 0:
            job.end(Finish.LENGTH)
            self._retire(job)
            return
        logits_1V, sampling = decoder.last(x_TD, index), request.sampling
        settings = None if sampling.greedy else decoder.place(gather_settings([sampling]))
        history = decoder.place(history_of([job], self.config.vocab_size)) if sampling.penalised else None
        tokens_1, _ = decoder.choose(logits_1V, settings, history, decoder.integers([len(request.prompt)]))
        scores = decoder.logprobs(logits_1V, tokens_1) if request.top_logprobs is not None else None
        job.asked = 1
        self._batch.join(job)
        self._read_tokens(Flight(tokens_1, scores, [job]))

    def _read_tokens(self, flight: Flight) -> None:
        """Wait for the tokens of a step and give them to those who still want them."""
        tokens, scores = flight.read()
        for row, job in enumerate(flight.rows):
            if job is None or job.finish is not None:
                continue
            wanted = job.request.top_logprobs
            token = int(tokens[row])
            logprob = None if scores is None or wanted is None else read_logprobs(scores, row, token, wanted)
            self._totals.answer += 1
            if job.take(token, logprob, self.stop_ids):
                self._retire(job)

    def _retire(self, job: Job) -> None:
        """Free what a job that has ended holds, and keep the row of its text."""
        assert job.finish is not None
        self._totals.finished[job.finish.value] += 1
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
        if job in self._reading:
            self._reading.remove(job)
        if job in self._batch.jobs:
            row = self._batch.leave(job)
            if row is not None and self._prefixes.limit:
                self._prefixes.add(job.tokens[: job.held], row)

    def _fail(self) -> None:
        jobs = [*self._reading, *self._batch.jobs]
        self._reading.clear()
        self._batch.reset()
        self._prefixes.clear()
        for job in jobs:
            job.end(Finish.ERROR, "the model could not be run; the server's log says why")
            self._totals.finished[Finish.ERROR.value] += 1
