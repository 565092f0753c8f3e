"""safetensors files, a tensor at a time: opened without reading an array, laid out before one is written.

The format: eight bytes with the header's length, a JSON header {name: {dtype, shape, data_offsets}}, the arrays one
after the other (github.com/huggingface/safetensors). The safetensors library judges a file before it is used.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from easylm_like.errors import UserError
from easylm_like.hf.tensors import Tensor, Tensors, in_parallel, read_at

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U16": np.dtype(np.uint16),  # differences of 16 and of 32 bits
    "U32": np.dtype(np.uint32),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Return what a file holds, by name, without reading an array.

    Raises:
        UserError: it is missing, damaged, cut off, names an array twice or has one of a dtype that is no weight's.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the weights as safetensors")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or cut off ({error}); copy it again") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        pairs = json.loads(file.read(length), object_pairs_hook=list)
    entries = {name: dict(entry) for name, entry in pairs if name != "__metadata__"}
    if len(doubled := [name for name, _ in pairs]) != len(set(doubled)):
        twice = sorted({name for name in doubled if doubled.count(name) > 1})
        raise UserError(f"{path}: names {', '.join(twice)} twice")
    if odd := [f"{name} ({entry['dtype']})" for name, entry in entries.items() if entry["dtype"] not in _DTYPES]:
        raise UserError(
            f"{path}: {', '.join(odd)}: expected weights of {', '.join(_DTYPES)}; quantised ones are not read"
        )
    tensors = {}
    for name, entry in entries.items():
        shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = Tensor(shape, dtype, partial(read_at, path, start, shape, dtype), (path, start))
    return tensors


def write_safetensors(
    folder: Path,
    tensors: Tensors,
    *,
    stem: str = "model",
    shard_bytes: int,
    say: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Write `tensors` as FOLDER/STEM.safetensors, or as numbered shards of `shard_bytes` with their index.

    The files have their full length before the first array is read, so that a full disk shows at once. `say` is
    called with the bytes of every array that is written. Returns the names of the files.
    """
    shards = list(_shards(tensors, shard_bytes))
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [f"{stem}.safetensors"]
    places: dict[str, tuple[Path, int]] = {}
    for name, shard in zip(names, shards, strict=True):
        places |= _begin(folder / name, shard)
    for name in in_parallel(lambda name: _write(name, *places[name], tensors[name]), tensors):
        say(tensors[name].nbytes)
    if len(shards) > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        metadata = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        index = {"metadata": metadata, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return names


def _shards(tensors: Tensors, shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each file, in order, as many as fit; one that is larger has a file of its own."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > shard_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _begin(path: Path, shard: Mapping[str, Tensor]) -> dict[str, tuple[Path, int]]:
    """Make a file of its full length with its header; returns where in it every array goes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, tensor in shard.items():
        offsets[name], end = end, end + tensor.nbytes
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offsets[name], end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of 8
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        if end and hasattr(os, "posix_fallocate"):  # macOS has none: there a full disk shows later
            os.posix_fallocate(file.fileno(), 0, start + end)
    return {name: (path, start + offset) for name, offset in offsets.items()}


def _write(name: str, path: Path, offset: int, tensor: Tensor) -> str:
    with path.open("r+b", buffering=0) as file:
        if tensor.place is not None and _copied(tensor.place, file.fileno(), offset, tensor.nbytes):
            return name
        array = np.ascontiguousarray(tensor.read())
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), (name, array.shape, tensor.shape)
        file.seek(offset)
        left = array.reshape(-1).view(np.uint8).data
        while left:
            left = left[file.write(left) :]
    return name


def _copied(place: tuple[Path, int], to: int, offset: int, size: int) -> bool:
    """Let the system copy bytes from one file to another; False where it cannot."""
    path, start = place
    if not hasattr(os, "copy_file_range"):  # macOS
        return False
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < size:
            try:
                count = os.copy_file_range(file.fileno(), to, size - done, start + done, offset + done)
            except OSError as error:
                if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # other file systems
                    return False
                raise
            if not count:
                raise UserError(f"{path}: cut off while it was read; copy it again")
            done += count
    return True
