"""cuDNN's attention on the GPU at hand: right against the definition in fp32, then how long it takes.

    python -m benchmarks.gpu_attention --rows 2 --row-length 4096 --max-segments 16

Packed rows with padding, grouped heads, with and without a window. For the output and each gradient it prints the
largest difference from `Attention.XLA` in fp32, over the largest value there is, beside that of XLA in bfloat16: the
first should not be much more than the second. Then milliseconds, forward and forward with backward, for each backend
and for other values of --max-segments, which cuDNN's scratch grows with. Prints, asserts nothing.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from easylm_like.model.attention import Places, attend
from easylm_like.model.config import Attention

Result = tuple[jax.Array, ...]


def main() -> None:
    """Print a table of differences and one of times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--row-length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--max-segments", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    flags = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {vars(flags)}")
    places = _packed(flags.rows, flags.row_length, flags.max_segments)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (flags.heads, flags.kv_heads, flags.kv_heads, flags.heads)
    shapes = [(flags.rows, flags.row_length, number, flags.head_dim) for number in heads]
    q, k, v, weight = (jax.random.normal(*pair, jnp.bfloat16) for pair in zip(keys, shapes, strict=True))
    weight *= (places[0] > 0)[:, :, None, None]
    for window in (None, flags.row_length // 8):
        _print_differences(window, places, flags.max_segments, (q, k, v, weight))
    for most in (flags.max_segments, 4 * flags.max_segments):
        for backend in (Attention.XLA, Attention.CHUNKED, Attention.CUDNN):
            forward, both = _functions(backend, None, places, most)
            times = [_milliseconds(f, (q, k, v, weight), flags.repeats) for f in (forward, both)]
            print(f"max_segments {most:4} {backend:8} forward {times[0]:8.2f} ms, with backward {times[1]:8.2f} ms")


def _packed(rows: int, length: int, records: int) -> Places:
    """Return segments and positions of rows with 1 to `records` records of random lengths and some padding."""
    random = np.random.default_rng(0)
    segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row in range(rows):
        number = records if row == 0 else random.integers(1, records + 1)
        ends = np.sort(random.choice(np.arange(1, length), number, replace=False))
        for record, (begin, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
            segments[row, begin:end], positions[row, begin:end] = record, np.arange(end - begin)
    return jnp.asarray(segments), jnp.asarray(positions)


def _functions(
    backend: Attention, window: int | None, places: Places, max_segments: int
) -> tuple[Callable[..., Result], Callable[..., Result]]:
    """Return jitted (q, k, v, weight) -> (output,) and -> (output, dq, dk, dv)."""
    kernel = partial(attend, places=(places, places), window=window, backend=backend, max_segments=max_segments)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array) -> Result:
        return (kernel(q, k, v),)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array) -> Result:
        out, pull = jax.vjp(kernel, q, k, v)
        return out, *pull(weight.astype(out.dtype))

    return jax.jit(forward), jax.jit(both)


def _print_differences(window: int | None, places: Places, max_segments: int, arrays: Result) -> None:
    wide = [x.astype(jnp.float32) for x in arrays]
    real = (places[0] > 0)[:, :, None, None]
    with jax.default_matmul_precision("highest"):
        wanted = _functions(Attention.XLA, window, places, max_segments)[1](*wide)
    for backend in (Attention.XLA, Attention.CUDNN):
        got = _functions(backend, window, places, max_segments)[1](*arrays)
        off = [
            float(jnp.abs(jnp.where(real, x.astype(jnp.float32) - y, 0)).max() / jnp.abs(jnp.where(real, y, 0)).max())
            for x, y in zip(got, wanted, strict=True)
        ]
        print(f"window {window}: {backend:6} " + ", ".join(map("{} {:.1e}".format, ("out", "dq", "dk", "dv"), off)))


def _milliseconds(function: Callable[..., Result], arrays: Result, repeats: int) -> float:
    jax.block_until_ready(function(*arrays))
    begin = time.perf_counter()
    for _ in range(repeats):
        result = function(*arrays)
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) * 1000 / repeats


if __name__ == "__main__":
    main()
