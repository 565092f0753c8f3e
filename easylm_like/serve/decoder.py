"""What an engine runs on the devices: every program that it ever needs, compiled before the first request.

Sizes come from a few buckets: `batches` (rows that are decoded together), `lengths` (places of a cache) and `chunks`
(tokens of a prompt that are read at once). `warm_up` runs each combination once.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easylm_like.model.config import LlamaConfig
from easylm_like.serve.choose import (
    History,
    Settings,
    count,
    draw,
    gather_settings,
    greedy,
    logprobs,
    penalise,
)
from easylm_like.serve.forward import Cache, decode, empty_cache, extract_layer, insert_layer, prefill
from easylm_like.serve.request import Sampling
from easylm_like.serve.weights import Weights, logits

Tree = TypeVar("Tree")
Scores = tuple[jax.Array, jax.Array, jax.Array]  # log p of the tokens, the highest log p at each place, their ids


@dataclass(frozen=True, slots=True)
class Buckets:
    """The sizes that programs are compiled for, each ascending."""

    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    chunks: tuple[int, ...]

    def batch(self, rows: int) -> int:
        """Return the smallest batch that holds `rows`."""
        return next(size for size in self.batches if size >= rows)

    def length(self, tokens: int) -> int:
        """Return the smallest cache that holds `tokens`."""
        return next(size for size in self.lengths if size >= tokens)

    def chunk(self, tokens: int, length: int) -> int:
        """Return how many tokens to read next of so many that are left, in a row of `length` places.

        The smallest chunk that holds them all, unless more than half of it would be padding.
        """
        sizes = [size for size in self.chunks if size <= length]
        whole = next((size for size in sizes if tokens <= size <= max(2 * tokens, sizes[0])), None)
        return whole or max(size for size in sizes if size <= tokens)


def choose_buckets(slots: int, context: int, *, one_size: bool = False) -> Buckets:
    """Return 1, 4, 8, ... rows up to `slots` and 256, 1024, ... places up to `context`; `one_size`: only the largest.

    Two rows would be hardly faster than four.
    """
    batches = [1 << n for n in range(slots.bit_length()) if 1 << n < slots and n != 1]
    lengths = [256 * 4**n for n in range(16) if 256 * 4**n < context]
    chunks = tuple(size for size in (16, 64, 256) if size <= context) or (context,)
    if one_size:
        return Buckets((slots,), (context,), chunks)
    return Buckets((*batches, slots), (*lengths, context), chunks)


@dataclass(slots=True)
class Decoder:
    """A model on a mesh and its compiled programs; holds no request and no cache."""

    config: LlamaConfig
    weights: Weights
    mesh: Mesh
    buckets: Buckets
    dtype: str
    _programs: dict[str, jax.stages.Wrapped] = field(default_factory=dict)

    def __post_init__(self) -> None:
        precision = "highest" if self.dtype == "float32" else "default"  # accelerators round fp32's factors otherwise
        spread = NamedSharding(self.mesh, PartitionSpec(None, "tensor"))
        whole = NamedSharding(self.mesh, PartitionSpec())
        program = partial(_compile, precision)
        self._programs = {
            "step": program(
                partial(decode, self.config, scatter=not self._on_cpu),
                donate_argnums=(1,),
                out_shardings=(whole, whole, spread),
            ),
            "read": program(partial(prefill, self.config), donate_argnums=(1,), out_shardings=(whole, spread)),
            "last": program(self._last, out_shardings=whole),
            "score": program(self._score, out_shardings=whole),
            "empty": program(self._empty, static_argnums=(0, 1), out_shardings=spread),
            "insert": program(insert_layer, donate_argnums=(0,), out_shardings=spread),
            "extract": program(extract_layer, static_argnums=(2,), out_shardings=spread),
            "greedy": program(greedy, out_shardings=whole),
            "draw": program(draw, out_shardings=whole),
            "penalised": program(_penalised, donate_argnums=(2,), out_shardings=whole),
            "logprobs": program(logprobs, out_shardings=whole),
        }

    @property
    def _on_cpu(self) -> bool:
        return bool(self.mesh.devices.flat[0].platform == "cpu")

    def empty(self, rows: int, length: int) -> Cache:
        """Return a cache without entries."""
        return self._programs["empty"](rows, length)

    def read(self, row: Cache, tokens: np.ndarray, start: int) -> tuple[jax.Array, Cache, int, int]:
        """Read the next chunk of a prompt into its row, which is given away.

        Returns (x [T, D], the row, the place of x[0], the place after the last token that was read). Where a chunk
        would reach beyond the row's end it begins before `start`, and reads some tokens again.
        """
        size = self.buckets.chunk(len(tokens) - start, row.length)
        first = min(start, row.length - size)
        after = min(first + size, len(tokens))
        chunk = np.zeros(size, np.int32)
        chunk[: after - first] = tokens[first:after]
        x_TD, row = self._programs["read"](self.weights, row, chunk, np.int32(first))
        return x_TD, row, first, after

    def last(self, x_TD: jax.Array, index: int) -> jax.Array:
        """Return the logits [1, V] after token `index` of a chunk."""
        return self._programs["last"](self.weights, x_TD, np.int32(index))

    def score(self, x_TD: jax.Array, targets_T: np.ndarray) -> Scores:
        """Return the log-probabilities of the token after each of a chunk."""
        return self._programs["score"](self.weights, x_TD, targets_T)

    def step(self, cache: Cache, tokens_B: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array, Cache]:
        """Read one token of each row: (logits [B, V], lengths + 1, cache); the cache is given away."""
        return self._programs["step"](self.weights, cache, tokens_B, lengths_B)

    def choose(
        self, logits_BV: jax.Array, settings: Settings | None, history: History | None, places_B: jax.Array
    ) -> tuple[jax.Array, History | None]:
        """Return (the next tokens [B], the history with them); without settings all rows are greedy.

        `places_B` is where the tokens will stand. `history`, which is given away, is there if any row has penalties.
        """
        if settings is None:
            return self._programs["greedy"](logits_BV), None
        if history is None:
            return self._programs["draw"](logits_BV, settings, places_B), None
        return self._programs["penalised"](logits_BV, settings, history, places_B)

    def logprobs(self, logits_BV: jax.Array, tokens_B: jax.Array) -> Scores:
        """Return the log-probabilities of tokens and the likeliest ones beside them."""
        return self._programs["logprobs"](logits_BV, tokens_B)

    def insert(self, cache: Cache, row: Cache, at: int) -> Cache:
        """Return the cache, which is given away, with `row`, which may be shorter, in row `at`."""
        return self._by_layer("insert", cache, row, np.int32(at))

    def extract(self, cache: Cache, at: int, length: int) -> Cache:
        """Return a copy of the first `length` places of row `at`."""
        parts = [self._programs["extract"](layer, np.int32(at), length) for layer in zip(cache.k, cache.v, strict=True)]
        return _join(parts)

    def warm_up(self, say: Callable[[str], None]) -> None:
        """Run every program in every size that requests can lead to.

        On a CPU several at a time; elsewhere the caches of two runs might not fit, and XLA itself uses all cores.
        """
        todo = list(self._sizes())
        with ThreadPoolExecutor(os.cpu_count() if self._on_cpu else 1) as threads:
            runs = [(name, threads.submit(_finish, run)) for name, run in todo]
            for number, (name, running) in enumerate(runs, start=1):
                say(f"compiling {number} of {len(todo)}: {name}")
                running.result()

    def _sizes(self) -> Iterator[tuple[str, Callable[[], object]]]:
        sizes = self.buckets
        for rows, length in product(sizes.batches, sizes.lengths):
            yield f"a step of {rows} x {length}", partial(self._warm_step, rows, length)
        for length in sizes.lengths:
            for size in sizes.chunks:
                if size <= length:
                    yield f"reading {size} tokens of {length}", partial(self._warm_read, size, length)
            for other in sizes.lengths:
                yield f"copies of {length} to {other}", partial(self._warm_copies, length, other)
        for rows in sorted({1, *sizes.batches}):
            yield f"choosing {rows}", partial(self._warm_choice, rows)

    def _warm_step(self, rows: int, length: int) -> object:
        tokens = self.integers([0] * rows)
        logits_BV, lengths, cache = self.step(self.empty(rows, length), tokens, self.integers([0] * rows))
        tokens, _ = self.choose(logits_BV, None, None, lengths)
        return self.step(cache, tokens, lengths)  # once more, with what the programs themselves give

    def _warm_read(self, size: int, length: int) -> object:
        program = self._programs["read"]
        x_TD, row = program(self.weights, self.empty(1, length), np.zeros(size, np.int32), np.int32(0))
        return self.last(x_TD, 0), self.score(x_TD, np.zeros(size, np.int32)), row

    def _warm_copies(self, length: int, other: int) -> object:
        row = self.extract(self.empty(1, length), 0, other)
        found: list[object] = [row]
        for rows in self.buckets.batches:
            found.append(self.extract(self.empty(rows, length), 0, other))
            if other <= length:
                found.append(self.insert(self.empty(rows, length), row, 0))
        return found

    def _warm_choice(self, rows: int) -> object:
        V = self.config.vocab_size
        logits_BV = jax.device_put(np.zeros((rows, V), np.float32), NamedSharding(self.mesh, PartitionSpec()))
        settings = self.place(gather_settings([Sampling()] * rows))
        places = self.integers([0] * rows)
        history = self.place(no_history(rows, V))
        tokens, _ = self.choose(logits_BV, None, None, places)
        drawn, _ = self.choose(logits_BV, settings, None, places)
        return self.logprobs(logits_BV, tokens), drawn, self.choose(logits_BV, settings, history, places)

    def integers(self, numbers: Sequence[int]) -> jax.Array:
        """Return an int32 vector whole on every device."""
        return jax.device_put(np.array(numbers, np.int32), NamedSharding(self.mesh, PartitionSpec()))

    def place(self, host: Tree) -> Tree:
        """Return arrays of the host (a tree of them) whole on every device."""
        return jax.device_put(host, NamedSharding(self.mesh, PartitionSpec()))

    def _by_layer(self, name: str, cache: Cache, row: Cache, at: np.int32) -> Cache:
        program = self._programs[name]
        layers = zip(zip(cache.k, cache.v, strict=True), zip(row.k, row.v, strict=True), strict=True)
        return _join([program(layer, part, at) for layer, part in layers])

    def _empty(self, rows: int, length: int) -> Cache:
        return empty_cache(self.config, rows, length, self.dtype)

    def _last(self, weights: Weights, x_TD: jax.Array, index: jax.Array) -> jax.Array:
        return logits(self.config, weights, jax.lax.dynamic_slice_in_dim(x_TD, index, 1))

    def _score(self, weights: Weights, x_TD: jax.Array, targets_T: jax.Array) -> Scores:
        return logprobs(logits(self.config, weights, x_TD), targets_T)


def no_history(rows: int, vocab_size: int) -> History:
    """Return the history of rows without a token, on the host."""
    zeros = np.zeros((rows, vocab_size), np.int32)
    return History(zeros.astype(np.float32), zeros, zeros.copy())


def _compile(
    precision: str,
    function: Callable[..., object],
    *,
    out_shardings: object,
    donate_argnums: tuple[int, ...] = (),
    static_argnums: tuple[int, ...] = (),
) -> jax.stages.Wrapped:
    def traced(*arguments: object) -> object:
        with jax.default_matmul_precision(precision):
            return function(*arguments)

    return jax.jit(traced, out_shardings=out_shardings, donate_argnums=donate_argnums, static_argnums=static_argnums)


def _finish(run: Callable[[], object]) -> None:
    jax.block_until_ready(run())


def _penalised(
    logits_BV: jax.Array, settings: Settings, history: History, places_B: jax.Array
) -> tuple[jax.Array, History]:
    tokens_B = draw(penalise(logits_BV, settings, history), settings, places_B)
    return tokens_B, count(history, tokens_B)


def _join(layers: Sequence[tuple[jax.Array, jax.Array]]) -> Cache:
    keys, values = zip(*layers, strict=True)
    return Cache(tuple(keys), tuple(values))


class Compilations:
    """Counts the programs that XLA compiles for the thread that makes it, from then on."""

    def __init__(self) -> None:
        self.count, self._thread = 0, threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def stop(self) -> None:
        """Count no more."""
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and threading.get_ident() == self._thread:
            self.count += 1
