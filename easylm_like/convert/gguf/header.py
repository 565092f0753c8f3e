"""The head of a GGUF file: its metadata, and where its tensors lie, none of which is read.

The format is that of ggml's docs/gguf.md. `gguf.GGUFReader` reads it too, but makes two NumPy arrays of every token
and every merge: 4.4 s for SmolLM2's 49,152 tokens, where this takes 0.2 s.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from easylm_like.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32  # of the data, where general.alignment does not say another


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: `kind` is the name of its ggml type, `offset` counts from the beginning of the file."""

    path: Path
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file, or all parts of a split one, says before its data."""

    metadata: dict[str, object]
    tensors: dict[str, Stored]


def read_header(path: Path) -> Header:
    """Read the head of a GGUF file; of a split one, whose first part is given, that of all parts.

    Raises:
        UserError: it is no GGUF file of this machine's byte order, is cut off, or a part is missing.
    """
    first = _read_one(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return first
    name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if name is None or int(name[2]) != 1 or int(name[3]) != count:
        raise UserError(
            f"{path}: is one of {count} parts of a model; give the first one, NAME-00001-of-{count:05}.gguf"
        )
    parts = [path.with_name(f"{name[1]}-{part:05}-of-{count:05}.gguf") for part in range(2, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise UserError(f"{path}: {', '.join(missing)} must lie beside it; {len(missing)} of {count} parts are missing")
    tensors = dict(first.tensors)
    for part in parts:
        more = _read_one(part).tensors
        if doubled := sorted(tensors.keys() & more.keys()):
            raise UserError(f"{part}: has tensors that an earlier part has: {', '.join(doubled)}")
        tensors |= more
    return Header(first.metadata, tensors)


def _read_one(path: Path) -> Header:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start[:4] != MAGIC:
            raise UserError(f"{path}: not a GGUF file: it begins with {start[:4]!r} instead of {MAGIC!r}")
        version = int.from_bytes(start[4:], "little")
        if version and not version & 0xFFFF:
            raise UserError(f"{path}: a GGUF file for big-endian machines; convert it with gguf-convert-endian")
        if version not in VERSIONS and len(start) == 8:
            raise UserError(f"{path}: GGUF version {version}; this library reads 2 and 3, which llama.cpp writes")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path, 8), size)
        except struct.error as error:
            raise UserError(f"{path}: is cut off: its {size} bytes end inside the header; copy it again") from error


@dataclass(slots=True)
class _Cursor:
    """A place in the mapped file."""

    data: mmap.mmap
    path: Path
    place: int

    def take(self, form: str) -> tuple[int | float | bool, ...]:
        """Return the little-endian numbers of a struct format at this place, and move on."""
        values = struct.unpack_from("<" + form, self.data, self.place)
        self.place += struct.calcsize("<" + form)
        return values

    def integer(self, form: str) -> int:
        return int(self.take(form)[0])

    def string(self) -> str:
        end = self.integer("Q") + self.place
        if end > len(self.data):
            raise struct.error("a string ends behind the file")
        text, self.place = self.data[self.place : end], end
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: damaged: the header's {text[:40]!r} is not UTF-8") from error

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind != ARRAY:
            raise UserError(f"{self.path}: damaged: the header has a value of the unknown type {kind}")
        kind, count = self.integer("I"), self.integer("Q")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise UserError(f"{self.path}: damaged: the header has an array of the unknown type {kind}")
        if count > len(self.data):
            raise struct.error("an array ends behind the file")
        return list(self.take(f"{count}{SCALARS[kind]}"))


def _parse(cursor: _Cursor, size: int) -> Header:
    tensor_count, value_count = cursor.integer("Q"), cursor.integer("Q")
    metadata: dict[str, object] = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise UserError(f"{cursor.path}: damaged: {key} is there twice")
        metadata[key] = cursor.value(cursor.integer("I"))
    found: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, axes = cursor.string(), cursor.integer("I")
        shape = tuple(cursor.integer("Q") for _ in range(axes))[::-1]  # ggml's first axis is the one that lies together
        found.append((name, shape, cursor.integer("I"), cursor.integer("Q")))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise UserError(f"{cursor.path}: damaged: general.alignment is {alignment!r}")
    start = -(-cursor.place // alignment) * alignment
    return Header(metadata, _place(cursor.path, size, start, found))


def _place(path: Path, size: int, start: int, found: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, Stored]:
    """Return where each tensor lies; one that is doubled, of an unknown type or behind the file's end is an error."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kinds = {kind.value: kind for kind in GGMLQuantizationType}
    tensors: dict[str, Stored] = {}
    problems: list[str] = []
    needed = size
    for name, shape, number, offset in found:
        if name in tensors:
            problems.append(f"{name} is there twice")
        if number not in kinds:
            problems.append(f"{name} is of ggml type {number}, which gguf-py does not know")
            continue
        kind = kinds[number]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            problems.append(f"{name} is {shape}, and {kind.name} stores rows of a multiple of {block}")
            continue
        nbytes = prod(shape) // block * block_bytes
        tensors[name] = Stored(path, shape, kind.name, start + offset, nbytes)
        needed = max(needed, start + offset + nbytes)
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    if needed > size:
        raise UserError(f"{path}: is cut off: it has {size} bytes, its header tells of {needed}; copy it again")
    return tensors
