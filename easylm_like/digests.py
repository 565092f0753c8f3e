"""The content of a folder, written down when it was made: a lost, cut or changed file is found by its name.

Disks and copies lose bits, and neither safetensors nor Orbax notices one in the middle of an array.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DIGESTS = "files.json"  # {path in the folder: [bytes, SHA-256]}
THREADS = min(8, os.cpu_count() or 1)  # hashing leaves the interpreter's lock alone; a disk is slower than eight cores


def write_digests(folder: Path) -> None:
    """Write `folder`/files.json about all that lies in it, and see to it that everything is on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(_flush, files))
        found = dict(zip((str(path.relative_to(folder)) for path in files), threads.map(_digest, files), strict=True))
    with (folder / DIGESTS).open("w") as out:
        json.dump(found, out, indent=0)
    _flush(folder / DIGESTS)


def find_damage(folder: Path, under: str = "") -> list[str]:
    """Return a sentence for every file of `folder` that is not what it was, none if all are; `under` looks at less.

    `under` is the beginning of the paths that are compared, such as "params/".
    """
    try:
        written = json.loads((folder / DIGESTS).read_text())
        wanted = {name: (size, digest) for name, (size, digest) in written.items() if name.startswith(under)}
    except FileNotFoundError:
        return [f"{folder / DIGESTS} is missing"]
    except (ValueError, AttributeError, TypeError):
        return [f"{folder / DIGESTS} is damaged"]
    if not wanted:
        return [f"{folder / DIGESTS} is damaged: it names no file {under}..."]
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda name: _compare(folder / name, *wanted[name]), sorted(wanted))
        return [sentence for sentence in found if sentence]


def _compare(path: Path, size: int, digest: str) -> str:
    try:
        now, content = _digest(path)
    except FileNotFoundError:
        return f"{path} is missing"
    if now != size:
        return f"{path} has {now} bytes and had {size}"
    return "" if content == digest else f"{path} is damaged: its content is not what was written"


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        return content.tell(), digest


def _flush(path: Path) -> None:
    with path.open("rb") as content:
        os.fsync(content.fileno())
