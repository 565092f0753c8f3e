"""Arrays that stay in their files until one is wanted: what every reader of weights gives and every writer takes.

A model of any size then passes through the memory of a few matrices.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Condition
from typing import Protocol, TypeVar

import ml_dtypes
import numpy as np

from easylm_like.errors import UserError

# The names that safetensors, config.json and this library's commands have for what weights are stored in.
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array somewhere else. `read` brings it, and may be called by several threads, and again.

    `place` is (file, offset) where its bytes lie as they are, so that they can be copied without being read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    place: tuple[Path, int] | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes of the array once it is read."""
        return prod(self.shape) * self.dtype.itemsize

    def then(self, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...] | None = None) -> "Tensor":
        """Return this array changed after it is read, its dtype kept; `shape` is what it has then, if another."""
        return Tensor(self.shape if shape is None else shape, self.dtype, lambda: change(self.read()))

    def astype(self, dtype: np.dtype) -> "Tensor":
        """Return this array rounded to `dtype` after it is read."""
        if dtype == self.dtype:
            return self

        def rounded() -> np.ndarray:
            with np.errstate(over="ignore"):  # what becomes infinite is found in what was written, and told by name
                return self.read().astype(dtype)

        return Tensor(self.shape, dtype, rounded)


Tensors = Mapping[str, Tensor]
Result = TypeVar("Result")

THREADS = 4  # reading, changing and writing take turns in each
IN_FLIGHT = 256 << 20  # bytes of tensors that threads work on at once; each takes two or three times as many


def in_parallel(work: Callable[[str], Result], tensors: Tensors) -> Iterator[Result]:
    """Yield work(name) of every tensor, in order, from a few threads that together hold no more than IN_FLIGHT bytes.

    A tensor of more is worked on alone.
    """
    free, changed = [IN_FLIGHT], Condition()

    def one(name: str) -> Result:
        size = min(tensors[name].nbytes, IN_FLIGHT)
        with changed:
            changed.wait_for(lambda: free[0] >= size)
            free[0] -= size
        try:
            return work(name)
        finally:
            with changed:
                free[0] += size
                changed.notify_all()

    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(one, tensors)


def as_tensor(array: np.ndarray) -> Tensor:
    """Return an array that is in memory already."""
    return Tensor(array.shape, array.dtype, lambda: array)


class Shaped(Protocol):
    """Whatever has a shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the sizes of its axes."""


def compare_shapes(found: Mapping[str, Shaped], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return a sentence for every array that is missing, unknown or of another shape."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    both = [name for name in wanted if name in found and found[name].shape != wanted[name]]
    return problems + [f"{name} is {found[name].shape} instead of {wanted[name]}" for name in both]


def transpose(matrix: np.ndarray) -> np.ndarray:
    """Return [in, out] as [out, in], in strips: in one piece it misses the processor's cache and takes 2.5 times."""
    bits = matrix.view(f"u{matrix.itemsize}")
    turned = np.empty(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), 256):
        turned[:, start : start + 256] = bits[start : start + 256].T
    return turned.view(matrix.dtype)


def read_at(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the array whose bytes begin at `offset` of a file.

    Raises:
        UserError: the file ends before it does; it was whole when it was opened.
    """
    array = np.empty(shape, dtype)
    left = array.reshape(-1).view(np.uint8).data
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while left:
            if not (count := file.readinto(left)):
                raise UserError(f"{path}: cut off while it was read; copy it again")
            left = left[count:]
    return array
