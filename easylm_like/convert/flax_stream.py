"""Where the arrays of a flax checkpoint lie in its file, found without reading them.

Two kinds of file: EasyLM's stream is one msgpack object [key, bytes] an array, one after the other: the key is the
path of the array in the state, the bytes hold what flax serialised (EasyLM/checkpoint.py, `save_train_state_to_file`).
flax's own file is one such serialised state. In both an array is an ext object around [shape, dtype, bytes], and one of
more than 2^30 bytes is cut in pieces (flax/serialization.py).

Objects are told by their first bytes; lengths are big-endian (github.com/msgpack/msgpack/blob/master/spec.md,
"Overview").
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgpack
import numpy as np

from easylm_like.errors import UserError
from easylm_like.hf.tensors import DTYPES, read_at

_BIN = {0xC4: 1, 0xC5: 2, 0xC6: 4}  # first byte -> bytes of the length after it
_EXT = {0xC7: 1, 0xC8: 2, 0xC9: 4}  # after the length comes one byte, the type; ext objects up to 16 bytes are others
_LONG_MAP = {0xDE: 2, 0xDF: 4}
_PAIR = 0x92  # an array of two
_ARRAY, _SCALAR = 1, 3  # flax/serialization.py, _MsgpackExtType
_CHUNKED = "__msgpack_chunked_array__"
_SMALL = 4096  # bytes that hold any key, shape or dtype


@dataclass(frozen=True, slots=True)
class Stored:
    """Where in the file an array lies: the (offset, bytes) of its pieces, and what flax says about it."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes in the file."""
        return sum(size for _, size in self.pieces)


Key = tuple[str, ...]
Index = list[tuple[Key, object]]  # a `Stored`, or the value itself of what is no array


@dataclass(frozen=True, slots=True)
class _Stream:
    """A file of msgpack objects."""

    path: Path
    file: int
    size: int

    def take(self, at: int, count: int) -> bytes:
        """Return `count` bytes; a file that ends before is a UserError."""
        self.check(at + count)
        return os.pread(self.file, count, at)

    def check(self, end: int) -> None:
        """Raise UserError unless the file goes on until `end`."""
        if end > self.size:
            raise UserError(f"{self.path}: cut off after {self.size} bytes, in the middle of an array; copy it again")

    def number(self, at: int, count: int) -> int:
        """Return the length, or first byte, of `count` bytes."""
        return int.from_bytes(self.take(at, count), "big")

    def small(self, at: int) -> tuple[object, int]:
        """Return an object of few bytes, and where it ends."""
        unpacker = msgpack.Unpacker(strict_map_key=False)
        unpacker.feed(os.pread(self.file, _SMALL, at))
        try:
            value = unpacker.unpack()
        except msgpack.OutOfData:
            self.check(at + _SMALL)
            raise self.odd(at) from None
        except ValueError:  # msgpack's, or of a text that is no UTF-8
            raise self.odd(at) from None
        return value, at + unpacker.tell()

    def odd(self, at: int) -> UserError:
        """Return what to raise where something else stands than EasyLM writes."""
        return UserError(f"{self.path}: not one of EasyLM's checkpoints, or damaged (at byte {at})")


def read_index(path: Path) -> Index:
    """Return (key, where it lies) of all that a file holds, in its order.

    Raises:
        UserError: the file is of another kind, damaged or cut off.
    """
    with path.open("rb") as file:
        stream = _Stream(path, file.fileno(), path.stat().st_size)
        try:
            if stream.number(0, 1) == _PAIR:
                return [leaf for key, value in _read_pairs(stream) for leaf in _flatten(key, value)]
            state, end = _read_node(stream, 0)
        except RecursionError:  # a state in a state in a state ...
            raise stream.odd(0) from None
    if end != stream.size or not isinstance(state, dict):
        raise stream.odd(0)
    return list(_flatten((), state))


def read_stored(path: Path, stored: Stored) -> np.ndarray:
    """Return an array."""
    dtype = DTYPES[stored.dtype]
    if len(stored.pieces) == 1:
        return read_at(path, stored.pieces[0][0], stored.shape, dtype)
    whole, done = np.empty(prod(stored.shape), dtype), 0
    for offset, size in stored.pieces:
        count = size // dtype.itemsize
        whole[done : done + count] = read_at(path, offset, (count,), dtype)
        done += count
    return whole.reshape(stored.shape)


def _read_pairs(stream: _Stream) -> Iterator[tuple[Key, object]]:
    at = 0
    while at < stream.size:
        if stream.number(at, 1) != _PAIR:
            raise stream.odd(at)
        key, at = stream.small(at + 1)
        start = at + 1 + _BIN.get(stream.number(at, 1), 0)
        if not isinstance(key, list) or start == at + 1:
            raise stream.odd(at)
        end = start + stream.number(at + 1, start - at - 1)
        stream.check(end)
        value, at = _read_node(stream, start)
        if at != end:
            raise stream.odd(start)
        yield tuple(map(str, key)), value


def _read_node(stream: _Stream, at: int) -> tuple[object, int]:
    """Return what flax wrote at `at`, and where it ends: a dict, where an array lies, or a small value."""
    first = stream.number(at, 1)
    if first in _EXT:
        return _read_extension(stream, at)
    if first >> 4 != 0x8 and first not in _LONG_MAP:
        return stream.small(at)
    count, at = first & 0xF, at + 1
    if first in _LONG_MAP:
        count, at = stream.number(at, _LONG_MAP[first]), at + _LONG_MAP[first]
    found: dict[str, object] = {}
    for _ in range(count):
        name, after = stream.small(at)
        if str(name) in found:
            raise UserError(f"{stream.path}: {name} is there twice (at byte {at})")
        found[str(name)], at = _read_node(stream, after)
    return _join(found, stream, at) if _CHUNKED in found else found, at


def _read_extension(stream: _Stream, at: int) -> tuple[object, int]:
    """Return where an array's bytes lie: an ext object of [shape, dtype, bytes]. Others (complex numbers) are None."""
    width = _EXT[stream.number(at, 1)]
    inside = at + 2 + width
    end = inside + stream.number(at + 1, width)
    stream.check(end)
    if stream.number(inside - 1, 1) not in (_ARRAY, _SCALAR):
        return None, end
    shape, at = stream.small(inside + 1)
    dtype, at = stream.small(at)
    width = _BIN.get(stream.number(at, 1), 0)
    start = at + 1 + width
    if not width or start + stream.number(at + 1, width) != end or not isinstance(shape, list):
        raise stream.odd(inside)
    return Stored(_shape(shape, stream, inside), str(dtype), ((start, end - start),)), end


def _join(chunks: Mapping[str, object], stream: _Stream, at: int) -> Stored:
    """Return an array that flax wrote in pieces, cut from its flattened values."""
    shape, parts = chunks.get("shape"), chunks.get("chunks")
    if not isinstance(shape, dict) or not isinstance(parts, dict):
        raise stream.odd(at)
    pieces = [part for i in range(len(parts)) if isinstance(part := parts.get(str(i)), Stored)]
    dtypes = {piece.dtype for piece in pieces}
    if len(pieces) != len(parts) or len(dtypes) != 1:
        raise stream.odd(at)
    sizes = _shape([shape.get(str(i)) for i in range(len(shape))], stream, at)
    return Stored(sizes, pieces[0].dtype, tuple(place for piece in pieces for place in piece.pieces))


def _shape(sizes: list[object], stream: _Stream, at: int) -> tuple[int, ...]:
    shape = tuple(size for size in sizes if isinstance(size, int))
    if len(shape) != len(sizes):
        raise stream.odd(at)
    return shape


def _flatten(key: Key, value: object) -> Iterator[tuple[Key, object]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _flatten((*key, name), inner)
