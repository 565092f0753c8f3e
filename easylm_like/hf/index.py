"""NAME.index.json: which file of a Hugging Face folder holds which weight, of safetensors and of PyTorch's files."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from easylm_like.errors import UserError
from easylm_like.hf.tensors import Tensor, Tensors


def read_index(path: Path) -> dict[str, list[str]]:
    """Return file -> names of the weights in it, as the index at `path` says.

    Raises:
        UserError: it is no index, or names a weight twice, a missing file, or a path out of its folder; all are listed.
    """
    doubled: list[str] = []

    def checked(pairs: list[tuple[str, object]]) -> dict[str, object]:
        counts = Counter(name for name, _ in pairs)
        doubled.extend(name for name, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        fields = json.loads(path.read_text("utf-8"), object_pairs_hook=checked)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    places = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{path}: has no weight_map that says for each weight which file holds it")
    files: dict[str, list[str]] = {}
    for name, file in places.items():
        files.setdefault(file, []).append(name)
    outside = [file for file in sorted(files) if not _stays_inside(path.parent, file)]
    problems = [f"{name} is named twice" for name in doubled]
    problems += [f"{file!r} is not a file inside the folder" for file in outside]
    problems += [
        f"{file} is missing" for file in sorted(files) if file not in outside and not (path.parent / file).is_file()
    ]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}; fetch the folder again, whole")
    return files


def read_indexed(path: Path, open_file: Callable[[Path], Tensors]) -> dict[str, Tensor]:
    """Return the arrays of every file that the index at `path` names, each file opened with `open_file`.

    Weights that the index does not know are among them: whoever knows the model says that they do not belong to it.

    Raises:
        UserError: a weight is not in the file that the index says, or in two; all are listed.
    """
    tensors: dict[str, Tensor] = {}
    found_in: dict[str, str] = {}
    problems = []
    for file, names in sorted(read_index(path).items()):
        opened = open_file(path.parent / file)
        problems += [f"{name} is not in {file}" for name in names if name not in opened]
        problems += [f"{name} is in {found_in[name]} and in {file}" for name in opened if name in found_in]
        tensors |= opened
        found_in |= dict.fromkeys(opened, file)
    if problems:
        raise UserError(f"{path}: the files are not those of this index: {'; '.join(problems)}")
    return tensors


def _stays_inside(folder: Path, file: str) -> bool:
    """Return whether `file` lies in the folder, links followed.

    Hugging Face's cache is the exception: its snapshots/REVISION/ holds nothing but links into blobs/ beside snapshots/
    (huggingface_hub, "Understand caching").
    """
    relative = PurePosixPath(file)
    if relative.is_absolute() or ".." in relative.parts or "\\" in file or "\0" in file:
        return False
    home = folder.resolve()
    allowed = [home] + ([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])
    try:
        return any((folder / file).resolve().is_relative_to(place) for place in allowed)
    except (OSError, RuntimeError):  # a link that leads to itself
        return False
