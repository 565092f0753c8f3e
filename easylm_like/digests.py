"""The content of a folder, written down when it was made: a lost, cut or changed file is found by its name.

Disks and copies lose bits, and neither safetensors nor Orbax notices one in the middle of an array.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DIGESTS = "files.json"  # {path in the folder: [bytes, SHA-256], "files.json": the SHA-256 of all these lines}
THREADS = min(8, os.cpu_count() or 1)  # hashing leaves the interpreter's lock alone; a disk is slower than eight cores


def write_digests(folder: Path) -> None:
    """Write `folder`/files.json about all that lies in it, and see to it that everything is on the disk."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file() and path != folder / DIGESTS]
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(flush, files))
        found = dict(zip((str(path.relative_to(folder)) for path in files), threads.map(_digest, files), strict=True))
    (folder / DIGESTS).write_text(_text(found))
    for path in (folder / DIGESTS, *(path for path in paths if path.is_dir()), folder):
        flush(path)


def find_damage(folder: Path, under: str = "") -> list[str]:
    """Return a sentence for every file of `folder` that is not what it was, none if all are; `under` looks at less.

    `under` is the beginning of the paths that are compared, such as "params/".
    """
    try:
        text = (folder / DIGESTS).read_bytes().decode()
        written = json.loads(text)
        del written[DIGESTS]
        if text != _text(written):  # a flipped bit in a name would hide the file
            raise ValueError
    except OSError as error:
        return [_why_not(folder / DIGESTS, error)]
    except (ValueError, KeyError, TypeError):
        return [f"{folder / DIGESTS} is damaged: its content is not what was written"]
    wanted = sorted(name for name in written if name.startswith(under))
    if not wanted:
        return [f"{folder / DIGESTS} names no file {under}..."]
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda name: _compare(folder / name, *written[name]), wanted)
        return [sentence for sentence in found if sentence]


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's names, would survive that the power fails."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some mounts flush no folders
            raise
    finally:
        os.close(at)


def _text(found: Mapping[str, tuple[int, str]]) -> str:
    own = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return json.dumps({**found, DIGESTS: own}, indent=0) + "\n"


def _compare(path: Path, size: int, digest: str) -> str:
    try:
        now, content = _digest(path)
    except OSError as error:
        return _why_not(path, error)
    if now != size:
        return f"{path} has {now} bytes and had {size}"
    return "" if content == digest else f"{path} is damaged: its content is not what was written"


def _why_not(path: Path, error: OSError) -> str:
    # A disk that returns no bytes for a file has lost it as well.
    return f"{path} is missing" if isinstance(error, FileNotFoundError) else f"{path} is damaged: {error.strerror}"


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        return content.tell(), digest
