"""Files and folders that appear whole or not at all, whatever happens while they are written."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from easylm_like.errors import UserError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, mark: str | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it takes the place of `path` when the block ends without an error.

    What is at `path` already is replaced only if it is empty or holds the file `mark`, by which a command knows its own
    work; anything else there is somebody's and stays.

    Raises:
        UserError: `path` holds something else.
    """
    path = Path(path)
    if path.exists() and not _replaceable(path, mark):
        wanted = "an empty folder or a new one" if mark is None else f"a folder with {mark} in it, or a new one"
        raise UserError(f"{path} exists and is not replaced: expected {wanted}; choose another or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            old = partial.with_suffix(".old")
            path.replace(old)
            partial.replace(path)
            shutil.rmtree(old)
        else:
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replaceable(path: Path, mark: str | None) -> bool:
    return path.is_dir() and (not any(path.iterdir()) or (mark is not None and (path / mark).exists()))
