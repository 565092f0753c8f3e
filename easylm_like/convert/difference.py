"""A model as its difference from another, which is how Alpaca and Koala were released.

Ours is exact: the difference of the bits of every weight, as unsigned integers modulo 2^16 or 2^32, so that the base
gives back every bit whatever the dtype, and stored as integers (U16, U32), so that nobody loads it as weights. Beside
it lies difference.json with checksums of the base and of the result.

A difference without that file is somebody else's: numbers to add. Alpaca's are a Hugging Face folder
(tatsu-lab/stanford_alpaca, weight_diff.py), Koala's a stream of EasyLM's (EasyLM/scripts/diff_checkpoint.py).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from easylm_like.convert.resize import ROWS_BY_ID, resize_rows
from easylm_like.convert.source import Source
from easylm_like.errors import UserError
from easylm_like.hf.tensors import DTYPES, Tensor, Tensors, in_parallel
from easylm_like.model.config import LlamaConfig

RECORD = "difference.json"
_BITS: dict[int, np.dtype] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


@dataclass(frozen=True, slots=True)
class Like:
    """What a weight is, without its values."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """What a difference was made from and gives: checksums and, by name, dtypes and shapes.

    The base's are those of its weights rounded to the dtypes of the result, so that float32 copies of a bfloat16 base
    are that base too.
    """

    base: str
    result: str
    base_tensors: Mapping[str, Like]
    tensors: Mapping[str, Like]


def checksum(tensors: Tensors) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of all tensors, whatever files they lie in.

    It is that of the JSON list [[name, dtype, shape, SHA-256 of the little-endian bytes], ...], sorted by name.
    """
    ordered = {name: tensors[name] for name in sorted(tensors)}
    digests = in_parallel(lambda name: hashlib.sha256(_bits(tensors[name].read()).data).hexdigest(), ordered)
    rows = [[n, str(t.dtype), list(t.shape), digest] for (n, t), digest in zip(ordered.items(), digests, strict=True)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def make_difference(tuned: Source, base: Source) -> tuple[dict[str, Tensor], Record]:
    """Return the difference of two models and what to keep with it; reads both once for their checksums.

    Rows of the embedding and the head that the base does not have are stored as they are.

    Raises:
        UserError: the models are of different shapes; all weights that differ are listed.
    """
    if problems := _compare_shapes(_describe(tuned.tensors), _describe(base.tensors)):
        raise UserError(f"{tuned.path} and {base.path} are no model and its base: {'; '.join(problems)}")
    rounded = _round_like(base, _describe(tuned.tensors))
    record = Record(checksum(rounded), checksum(tuned.tensors), _describe(rounded), _describe(tuned.tensors))
    difference = {
        name: Tensor(tensor.shape, _BITS[tensor.dtype.itemsize], partial(_subtract, tensor, rounded[name]))
        for name, tensor in tuned.tensors.items()
    }
    return difference, record


def recover(difference: Tensors, record: Record, base: Source) -> dict[str, Tensor]:
    """Return the weights that one of our differences gives with its base, which is read once for its checksum.

    Raises:
        UserError: it is not the base that the difference was made from, or the difference's files are not its own.
    """
    likes = {name: Like(str(_BITS[DTYPES[like.dtype].itemsize]), like.shape) for name, like in record.tensors.items()}
    if problems := _compare(_describe(difference), likes):
        raise UserError(f"the difference is not the one of its {RECORD}: {'; '.join(problems)}")
    shapes = {name: Like("", like.shape) for name, like in record.base_tensors.items()}
    if problems := _compare({name: Like("", tensor.shape) for name, tensor in base.tensors.items()}, shapes):
        raise UserError(f"{base.path} is not the base of this difference: {'; '.join(problems)}")
    rounded = _round_like(base, record.tensors)
    if (found := checksum(rounded)) != record.base:
        raise UserError(
            f"{base.path} is not the base of this difference: the checksum of its weights is {found}, expected "
            f"{record.base}"
        )
    return {
        name: Tensor(like.shape, DTYPES[like.dtype], partial(_add, difference[name], rounded[name]))
        for name, like in record.tensors.items()
    }


def check_result(tensors: Tensors, record: Record, where: str) -> None:
    """Raise UserError unless `tensors`, read from what was written, are what the difference was made of."""
    if (found := checksum(tensors)) != record.result:
        raise UserError(
            f"{where}: the recovered weights are not those that the difference was made of (checksum {found}, expected "
            f"{record.result}); its files are damaged, copy them again"
        )


def recover_numbers(difference: Tensors, base: Source, dtype: str | None = None) -> dict[str, Tensor]:
    """Return base + difference, for differences of others, which carry no checksum.

    Both are added in float32 and rounded to `dtype`, or to the difference's. A base with fewer ids has the mean of its
    rows, in float32, in the others, as in weight_diff.py.

    Raises:
        UserError: they are of different shapes (all weights that differ are listed), or the difference is one of ours.
    """
    if any(tensor.dtype in _BITS.values() for tensor in difference.values()):
        raise UserError(f"the difference is one of bits, and its {RECORD} is missing; copy that file too")
    if problems := _compare_shapes(_describe(difference), _describe(base.tensors)):
        raise UserError(f"{base.path} is not the base of this difference: {'; '.join(problems)}")
    recovered = {}
    for name, change in difference.items():
        whole = base.tensors[name].astype(DTYPES["float32"])
        if name in ROWS_BY_ID:
            whole = resize_rows(whole, change.shape[0])
        total = Tensor(change.shape, whole.dtype, partial(_add_numbers, whole, change))
        recovered[name] = total.astype(change.dtype if dtype is None else DTYPES[dtype])
    return recovered


def sum_of_weights(tensors: Tensors, config: LlamaConfig) -> tuple[float, float]:
    """Return the sum of all weights, without and with RoPE's frequencies, summed in float64.

    It is what Alpaca's weight_diff.py compares with 50637.1836 (to 0.01) for want of a checksum, before the weights are
    rounded to less than float32: pass those of `recover_numbers(..., "float32")`. transformers 4.28, with which that
    number was published, kept every layer's frequencies (`rotary_emb.inv_freq`) among the weights; later ones do not.
    """
    total = sum(in_parallel(lambda name: float(tensors[name].read().astype(np.float32).sum(dtype=np.float64)), tensors))
    powers = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**powers
    return total, total + config.n_layers * float(frequencies.sum(dtype=np.float64))


def write_record(folder: Path, record: Record) -> None:
    """Write FOLDER/difference.json."""
    fields = {
        "what": "difference of two models' bits (easylm_like): result = base + difference, modulo 2^16 or 2^32",
        "base": {"checksum": record.base, "tensors": _likes_to_json(record.base_tensors)},
        "result": {"checksum": record.result, "tensors": _likes_to_json(record.tensors)},
    }
    (folder / RECORD).write_text(json.dumps(fields, indent=1) + "\n")


def read_record(folder: Path) -> Record | None:
    """Return what lies in FOLDER/difference.json; None if there is none, and the difference is somebody else's.

    Raises:
        UserError: the file is not one of ours.
    """
    if not (folder / RECORD).is_file():
        return None
    try:
        fields = json.loads((folder / RECORD).read_text())
        base, result = fields["base"], fields["result"]
        old, new = _likes_from_json(base["tensors"]), _likes_from_json(result["tensors"])
        if problems := _compare_shapes(new, old):
            raise ValueError("; ".join(problems))
        return Record(str(base["checksum"]), str(result["checksum"]), old, new)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / RECORD}: damaged, or not one of this library's ({error!r})") from error


def _likes_to_json(likes: Mapping[str, Like]) -> dict[str, list[object]]:
    return {name: [like.dtype, list(like.shape)] for name, like in likes.items()}


def _likes_from_json(fields: Mapping[str, tuple[str, list[int]]]) -> dict[str, Like]:
    likes = {name: Like(dtype, tuple(map(int, shape))) for name, (dtype, shape) in fields.items()}
    if odd := [name for name, like in likes.items() if like.dtype not in DTYPES]:
        raise ValueError(f"{odd[0]} is {likes[odd[0]].dtype}")
    return likes


def _describe(tensors: Tensors) -> dict[str, Like]:
    return {name: Like(str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}


def _round_like(base: Source, likes: Mapping[str, Like]) -> dict[str, Tensor]:
    return {name: tensor.astype(DTYPES[likes[name].dtype]) for name, tensor in base.tensors.items()}


def _compare(found: Mapping[str, Like], wanted: Mapping[str, Like]) -> list[str]:
    """Return a sentence for every weight that is missing, unknown or another."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    both = [name for name in wanted if name in found and found[name] != wanted[name]]
    return problems + [
        f"{name} is {found[name].dtype}{found[name].shape} instead of {wanted[name].dtype}{wanted[name].shape}"
        for name in both
    ]


def _compare_shapes(tuned: Mapping[str, Like], base: Mapping[str, Like]) -> list[str]:
    """Return a sentence for every weight that a model and its base may not differ in: all but the number of ids."""

    def comparable(likes: Mapping[str, Like]) -> dict[str, Like]:
        shapes = {name: like.shape[1:] if name in ROWS_BY_ID else like.shape for name, like in likes.items()}
        return {name: Like("", shape) for name, shape in shapes.items()}

    return _compare(comparable(tuned), comparable(base))


def _bits(array: np.ndarray) -> np.ndarray:
    """Return the values as unsigned integers of their size."""
    return np.ascontiguousarray(array).view(_BITS[array.itemsize])


def _subtract(tuned: Tensor, base: Tensor) -> np.ndarray:
    change, old = _bits(tuned.read()).copy(), _bits(base.read())
    rows = min(len(change), len(old))
    np.subtract(change[:rows], old[:rows], out=change[:rows])  # modulo: unsigned integers wrap around
    return change


def _add(difference: Tensor, base: Tensor) -> np.ndarray:
    whole, old = difference.read().copy(), _bits(base.read())
    rows = min(len(whole), len(old))
    np.add(whole[:rows], old[:rows], out=whole[:rows])
    return whole.view(base.dtype)


def _add_numbers(base: Tensor, difference: Tensor) -> np.ndarray:
    return base.read() + difference.read().astype(np.float32)
