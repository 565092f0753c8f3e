"""PyTorch's files (.bin, .pth, .pt) without PyTorch, and without running what they contain.

torch.save writes, since PyTorch 1.6, a zip of uncompressed members: ARCHIVE/data.pkl, a pickle that describes the
tensors, ARCHIVE/data/N, the bytes of their storages, and ARCHIVE/byteorder (torch/serialization.py, PyTorch 2.13).
A pickle is a program. Unpickling looks up what it names and calls it; here its few opcodes that weights need are
replayed over plain values instead, so that nothing is ever looked up or called, and whatever else it names is refused.
"""

import os
import pickletools
import re
import reprlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from easylm_like.errors import UserError
from easylm_like.hf.index import read_indexed
from easylm_like.hf.tensors import DTYPES, Tensor, read_at

_ELEMENTS = {
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.DoubleStorage": "float64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
}
_BUFFERS = ("position_ids",)  # integers that old folders carry and nobody computes with: left out
_DICT, _VIEW = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_REFUSED = {
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_tensor_v3": "a tensor of a type with no storage class, such as float8",
    "torch._tensor._rebuild_from_type_v2": "a tensor with attributes of its own",
}
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number, pickled, before PyTorch 1.6
_ADVICE = "load it with torch where you trust it, and save model.state_dict() or, better, safetensors"


@dataclass(frozen=True, slots=True)
class _Name:
    """What a pickle would look up: a name, which stays a name."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """Elements of one type in a member of the zip."""

    elements: str
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor: which elements of a storage it has; `strides` count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Replay:
    """The state of a pickle's replay."""

    where: Path
    stack: list[object] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)

    def pop(self, count: int) -> list[object]:
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def pop_to_mark(self) -> list[object]:
        return self.pop(len(self.stack) - self.marks.pop())


def open_torch(path: Path) -> dict[str, Tensor]:
    """Return the tensors that torch.save wrote into the file at `path`, by name; nothing of them is read yet.

    Raises:
        UserError: it is damaged, would run code, or holds anything else than a flat mapping of names to tensors of
            float32, float16 or bfloat16.
    """
    try:
        with path.open("rb") as file:
            members, pickled = _read_archive(path, file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    value = _replay(path, pickled)
    tensors, problems = {}, []
    for name, view in _flat(path, value).items():
        if view.storage.elements not in DTYPES:
            if not name.endswith(_BUFFERS):
                problems.append(f"{name} is {view.storage.elements}")
            continue
        try:
            tensors[name] = _lazy(path, view, members)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UserError(f"{path}: tensors that cannot be read (only {', '.join(DTYPES)} are): {'; '.join(problems)}")
    return tensors


def open_torch_folder(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a Hugging Face folder's pytorch_model.bin, or of the files in its index.

    Raises:
        UserError: a file is missing, or not what the index says, or see `open_torch`.
    """
    one, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if one.is_file() and index.is_file():
        raise UserError(f"{folder}: has both {one.name} and {index.name}; move the one that is out of date away")
    if index.is_file():
        return read_indexed(index, open_torch)
    if not one.is_file():
        raise UserError(f"{folder}: has neither {one.name} nor {index.name}")
    return open_torch(one)


def _read_archive(path: Path, file: BinaryIO) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Return where the bytes of each storage lie, as (offset, size) by key, and the pickle."""
    start = file.read(len(_LEGACY))
    if start == _LEGACY:
        raise UserError(
            f"{path}: in PyTorch's format from before 1.6, which is not read; torch.load and torch.save it anew"
        )
    if not start.startswith(b"PK"):
        raise UserError(f"{path}: no file of PyTorch's (it begins with {start[:8]!r}); expected what torch.save writes")
    try:
        with zipfile.ZipFile(file) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            root = _check_members(path, infos)
            order = archive.read(root + "byteorder") if root + "byteorder" in infos else b"little"
            pickled = archive.read(root + "data.pkl")
            start_of_key = len(root + "data/")
            places = {n[start_of_key:]: _place(file, i) for n, i in infos.items() if n.startswith(root + "data/")}
    except UserError:
        raise
    # NotImplementedError is zipfile's word for a compression that it does not know.
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, ValueError) as error:
        raise UserError(f"{path}: damaged or cut off ({error}); copy it again") from error
    if order != b"little":
        raise UserError(
            f"{path}: its numbers are in {order.decode('ascii', 'replace')} byte order; only little is read"
        )
    return places, pickled


def _check_members(path: Path, infos: Mapping[str, zipfile.ZipInfo]) -> str:
    """Return the folder that all members of a PyTorch file are in, with its slash."""
    pickles = [name for name in infos if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise UserError(f"{path}: a zip, but not torch.save's: it has {len(pickles)} ARCHIVE/data.pkl instead of one")
    for name, info in infos.items():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UserError(f"{path}: {name} is compressed or encrypted; torch.save does neither, zip it anew with -0")
    return pickles[0].removesuffix("data.pkl")


def _place(file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Return offset and size of a stored member; its local header's name and extra field have lengths of their own."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise zipfile.BadZipFile(f"no member begins where {info.filename} should")
    offset = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if offset + info.file_size > os.fstat(file.fileno()).st_size:
        raise zipfile.BadZipFile(f"{info.filename} is longer than the file")
    return offset, info.file_size


def _replay(path: Path, pickled: bytes) -> object:
    """Return the value that a pickle describes, made of plain values, `_Name`s and `_View`s."""
    replay = _Replay(path)
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STOP":
                return replay.stack.pop()
            if opcode.name not in _OPCODES:
                raise UserError(f"{path}: its pickle uses {opcode.name}, which no tensor needs; {_ADVICE}")
            _OPCODES[opcode.name](replay, argument)
    except UserError:
        raise
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its data.pkl is damaged ({error}); copy it again") from error
    raise AssertionError("genops raises on a pickle without an end")


def _name(replay: _Replay, name: str) -> None:
    if name in _REFUSED:
        raise UserError(f"{replay.where}: holds {_REFUSED[name]} ({name}), which is not read here; convert it first")
    if name not in {_DICT, _VIEW, *_PARAMETERS, *_ELEMENTS}:
        raise UserError(
            f"{replay.where}: would run or import {name}. A file of weights must not run code, and nothing of it was "
            f"run; {_ADVICE}"
        )
    replay.stack.append(_Name(name))


def _named_by_stack(replay: _Replay, _: object) -> None:
    module, name = replay.pop(2)
    _name(replay, f"{module}.{name}")


def _reduce(replay: _Replay, _: object) -> None:
    """Put what a call would give in the place of a name and its arguments."""
    function, arguments = replay.pop(2)
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise ValueError("it calls what is no function")
    if function.name == _DICT:
        replay.stack.append({key: value for pairs in arguments for key, value in pairs})
    elif function.name in _PARAMETERS:
        replay.stack.append(arguments[0])
    elif function.name == _VIEW:
        replay.stack.append(_view(*arguments[:4], *arguments[6:]))
    else:
        raise ValueError(f"it calls {function.name}")


def _view(storage: object, offset: object, shape: object, strides: object, more: object = None) -> _View:
    whole = (offset, *shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else (None,)
    if not isinstance(storage, _Storage) or not all(isinstance(number, int) and number >= 0 for number in whole):
        raise ValueError("a tensor's storage, offset, shape or strides are none")
    assert isinstance(offset, int)
    assert isinstance(shape, tuple)
    assert isinstance(strides, tuple)
    if len(shape) != len(strides) or more:  # more: the bits that say conjugated or negated
        raise ValueError(f"a tensor of shape {shape} has strides {strides} and {more}")
    return _View(storage, offset, shape, strides)


def _storage(replay: _Replay, _: object) -> None:
    """Put a storage in the place of its ("storage", type, key, device, number of elements)."""
    (place,) = replay.pop(1)
    if not isinstance(place, tuple) or len(place) != 5 or place[0] != "storage":
        raise ValueError(f"{place!r} is no storage")
    _, kind, key, _, count = place
    if not isinstance(kind, _Name) or kind.name not in _ELEMENTS or not isinstance(count, int):
        raise ValueError(f"{kind!r} is no storage's type")
    replay.stack.append(_Storage(_ELEMENTS[kind.name], str(key), count))


def _set_items(replay: _Replay, items: list[object]) -> None:
    target = replay.stack[-1]
    if not isinstance(target, dict):
        raise ValueError("it sets an item of what is no dict")
    target.update(zip(items[::2], items[1::2], strict=True))


def _extend(replay: _Replay, items: list[object]) -> None:
    target = replay.stack[-1]
    if not isinstance(target, list):
        raise ValueError("it appends to what is no list")
    target.extend(items)


def _push(replay: _Replay, value: object) -> None:
    replay.stack.append(value)


def _tuple(count: int) -> Callable[[_Replay, object], None]:
    return lambda replay, _: replay.stack.append(tuple(replay.pop(count)))


def _memoize(replay: _Replay, index: object) -> None:
    replay.memo[index if isinstance(index, int) else len(replay.memo)] = replay.stack[-1]


def _recall(replay: _Replay, index: object) -> None:
    assert isinstance(index, int)
    replay.stack.append(replay.memo[index])


# What torch.save's pickles of state_dicts consist of, and the opcodes that later protocols have for the same.
_OPCODES: dict[str, Callable[[_Replay, object], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda replay, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _push),
    "NONE": lambda replay, _: _push(replay, None),
    "NEWTRUE": lambda replay, _: _push(replay, True),
    "NEWFALSE": lambda replay, _: _push(replay, False),
    "EMPTY_DICT": lambda replay, _: _push(replay, {}),
    "EMPTY_LIST": lambda replay, _: _push(replay, []),
    "EMPTY_TUPLE": _tuple(0),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda replay, _: _push(replay, tuple(replay.pop_to_mark())),
    "MARK": lambda replay, _: replay.marks.append(len(replay.stack)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _recall),
    "SETITEM": lambda replay, _: _set_items(replay, replay.pop(2)),
    "SETITEMS": lambda replay, _: _set_items(replay, replay.pop_to_mark()),
    "APPEND": lambda replay, _: _extend(replay, replay.pop(1)),
    "APPENDS": lambda replay, _: _extend(replay, replay.pop_to_mark()),
    "GLOBAL": lambda replay, name: _name(replay, str(name).replace(" ", ".")),
    "STACK_GLOBAL": _named_by_stack,
    "BINPERSID": _storage,
    "REDUCE": _reduce,
    "BUILD": lambda replay, _: replay.pop(1).clear(),  # a state_dict's _metadata: versions of modules
}


def _flat(path: Path, value: object) -> dict[str, _View]:
    """Return the names and tensors of a pickle's value; a UserError says what else is there."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {_describe(value)} instead of names and tensors; {_ADVICE}")
    others = {name: one for name, one in value.items() if not isinstance(one, _View) or not isinstance(name, str)}
    if others:
        _refuse_others(path, others)
    return value


def _refuse_others(path: Path, others: Mapping[object, object]) -> NoReturn:
    inner = [
        name
        for name, one in others.items()
        if isinstance(one, dict) and one and all(isinstance(part, _View) for part in one.values())
    ]
    advice = f"save the weights alone: torch.save(torch.load(FILE)[{inner[0]!r}], NEW_FILE)" if inner else _ADVICE
    found = ", ".join(f"{name!r} is {_describe(one)}" for name, one in others.items())
    raise UserError(f"{path}: not a plain mapping of names to tensors: {found}; {advice}")


def _describe(value: object) -> str:
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, _View):
        return f"a tensor {value.shape}"
    return value.name if isinstance(value, _Name) else reprlib.repr(value)


def _lazy(path: Path, view: _View, members: Mapping[str, tuple[int, int]]) -> Tensor:
    """Return a tensor that is read from its storage's member; a ValueError says what is wrong with that."""
    dtype, storage = DTYPES[view.storage.elements], view.storage
    if storage.key not in members:
        raise ValueError(f"data/{storage.key} is missing from the file")
    offset, size = members[storage.key]
    if size != storage.count * dtype.itemsize:
        raise ValueError(f"data/{storage.key} has {size} bytes instead of {storage.count * dtype.itemsize}")
    if prod(view.shape) and view.offset + _span(view.shape, view.strides) > storage.count:
        raise ValueError(f"reaches beyond the {storage.count} numbers of data/{storage.key}")
    start = offset + view.offset * dtype.itemsize
    return Tensor(view.shape, dtype, partial(_gather, path, dtype, start, view.shape, view.strides))


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return how many elements lie from the first to the last of a view that is not empty."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _gather(path: Path, dtype: np.dtype, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Return a strided view of the file from byte `start` on; rows with gaps between them are read one by one."""
    if not prod(shape):
        return np.empty(shape, dtype)
    span = _span(shape, strides)
    if span <= prod(shape) or len(shape) == 1:
        steps = tuple(stride * dtype.itemsize for stride in strides)
        flat = read_at(path, start, (span,), dtype)
        return np.asarray(np.lib.stride_tricks.as_strided(flat, shape, steps), order="C")
    axis = int(np.argmax([stride if size > 1 else -1 for size, stride in zip(shape, strides, strict=True)]))
    inner, inner_strides = shape[:axis] + shape[axis + 1 :], strides[:axis] + strides[axis + 1 :]
    array = np.empty(shape, dtype)
    for row in range(shape[axis]):
        begin = start + row * strides[axis] * dtype.itemsize
        array[(slice(None),) * axis + (row,)] = _gather(path, dtype, begin, inner, inner_strides)
    return array
