"""Attention forward and backward: time and temporaries of the backends that run here, and jax's own, in turns.

    python -m benchmarks.attention [--backends=xla,chunked] [--dtype=float32] [--rounds=3] [--shapes=8x256x6x48]

Shapes are rows x length x heads x head size. Rows hold one record each, or records of about 200 tokens packed; jax's
jax.nn.dot_product_attention knows no records, so packed rows go to it as a mask (which is made in the step, as the mask
of ours is). The gradient is that of a random projection of the result, with respect to q, k and v. "temporaries" is
what XLA plans beside inputs and results. What differs from xla by more than rounding ends the run with an error.
Asserts no times.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.train_case import MIB
from easylm_like.model.attention import Places, attend
from easylm_like.model.config import Attention

SHAPES = "8x256x6x48,2x512x12x64,1x2048x6x48,1x8192x6x48"
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest gradient
PEER = "jax.nn"


def main() -> None:
    """Run every shape, with whole and packed rows, and print a line a backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--backends", default="xla,chunked")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--record", type=int, default=200, help="mean tokens of a packed record")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    backends = [Attention(name) for name in flags.backends.split(",")]
    print(f"{'rows':>4} {'length':>6} {'heads':>7}  {'records':7}  {'backend':8} {'ms':>8} {'temporaries MiB':>15}")
    for shape in flags.shapes.split(","):
        B, T, N, H = map(int, shape.split("x"))
        for record in (T, flags.record):
            segments = packed_places(B, T, record)
            run_shape((B, T, N, H), segments, backends, flags)


def run_shape(
    shape: tuple[int, int, int, int], places: Places, backends: list[Attention], flags: argparse.Namespace
) -> None:
    """Compile and run all on one shape, in turns; print best times and their ratio to the peer's."""
    B, T, N, H = shape
    q, k, v, projection = (
        jax.random.normal(key, shape).astype(flags.dtype) for key in jax.random.split(jax.random.key(0), 4)
    )
    functions: dict[str, Callable[..., Any]] = {PEER: partial(theirs, packed=bool(places[0].max() > 1))}
    longest = int(places[0].max())
    functions |= {str(b): partial(ours, backend=b, max_segments=longest) for b in backends}
    steps, results = {}, {}
    for name, function in functions.items():
        gradient = jax.value_and_grad(partial(_projected, function), argnums=(0, 1, 2))
        steps[name] = jax.jit(gradient).lower(q, k, v, projection, places).compile()
        results[name] = jax.block_until_ready(steps[name](q, k, v, projection, places))[1]
    compare(results, TOLERANCE[flags.dtype])
    del results
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(flags.rounds):
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            began = time.perf_counter()
            jax.block_until_ready(steps[name](q, k, v, projection, places))
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        plan = steps[name].memory_analysis()
        temporaries = plan.temp_size_in_bytes / MIB if plan else 0.0
        ratios = sorted(a / b for a, b in zip(seconds[PEER], times, strict=True))
        faster = "" if name == PEER else f"  {statistics.median(ratios):.2f} times as fast as {PEER}"
        rows = f"{B:4} {T:6} {f'{N} x {H}':>7}  {'packed' if longest > 1 else 'one':7}"
        print(f"{rows}  {name:8} {1000 * min(times):8.1f} {temporaries:15,.1f}{faster}", flush=True)


def packed_places(rows: int, length: int, record: int) -> Places:
    """Return (segments, positions), int32 [B, T]: full rows of records of `record` tokens, give or take a half."""
    random = np.random.default_rng(0)
    segments, positions = np.ones((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row in range(rows):
        start, number = 0, 1
        while start < length:
            size = length if record >= length else int(random.integers(record // 2, record + record // 2 + 1))
            stop = min(start + size, length)
            segments[row, start:stop], positions[row, start:stop] = number, np.arange(stop - start)
            start, number = stop, number + 1
    return jnp.asarray(segments), jnp.asarray(positions)


def ours(q: jax.Array, k: jax.Array, v: jax.Array, places: Places, backend: Attention, max_segments: int) -> jax.Array:
    """Return the result of one of our backends."""
    return attend(q, k, v, (places, places), backend=backend, max_segments=max_segments)


def theirs(q: jax.Array, k: jax.Array, v: jax.Array, places: Places, packed: bool) -> jax.Array:
    """Return the result of jax's function."""
    mask_B1TT = (places[0][:, None, :, None] == places[0][:, None, None, :]) if packed else None
    return jax.nn.dot_product_attention(q, k, v, mask=mask_B1TT, is_causal=True)


def compare(results: dict[str, tuple[jax.Array, ...]], tolerance: float) -> None:
    """Exit with an error where gradients are not the peer's."""
    for name, gradients in results.items():
        for letter, got, wanted in zip("qkv", gradients, results[PEER], strict=True):
            got32, wanted32 = got.astype(jnp.float32), wanted.astype(jnp.float32)
            difference = float(jnp.max(jnp.abs(got32 - wanted32)) / jnp.max(jnp.abs(wanted32)))
            if not difference <= tolerance:
                sys.exit(f"{name}: the gradient of {letter} differs by {difference:.1e} of its largest value")


def _projected(
    function: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    projection: jax.Array,
    places: Places,
) -> jax.Array:
    return jnp.sum((function(q, k, v, places) * projection).astype(jnp.float32))


if __name__ == "__main__":
    main()
