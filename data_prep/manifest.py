"""What a build was made from: inputs with hashes, and the digest that says whether a second build would be the same."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from easylm_like.errors import UserError
from easylm_like.provenance import versions

from .config import MixtureConfig

NAME = "manifest.json"
MADE_BY = "data_prep build"


@dataclass(frozen=True, slots=True)
class Input:
    """A file that was read."""

    source: str
    path: str
    heldout: bool
    licence: str
    bytes: int
    sha256: str


def hash_inputs(config: MixtureConfig) -> list[Input]:
    """Return every file of the config with its hash."""
    return [
        Input(source.label, path, heldout, source.licence, Path(path).stat().st_size, hash_file(Path(path)))
        for source in config.sources
        for path, heldout in ((source.path, False), (source.heldout_path, True))
        if path
    ]


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def digest_of(config: MixtureConfig, inputs: list[Input]) -> str:
    """Return the hash of all that decides the result: config, bytes of the inputs, library version, this code."""
    code = [hash_file(path) for path in sorted(Path(__file__).parent.rglob("*.py"))]
    parts = [asdict(config), [i.sha256 for i in inputs], versions([]), code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_built(out: Path, digest: str) -> bool:
    """Return whether `out` holds the build with this digest, every file as it was written.

    Raises:
        UserError: `out` holds something that no build of ours wrote and that must not be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        manifest = json.loads((out / NAME).read_text("utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("made_by") != MADE_BY:
        raise UserError(f"{out} exists and is no build of {MADE_BY}; choose another --out or remove it")
    return manifest["digest"] == digest and all(
        (out / name).is_file() and hash_file(out / name) == output["sha256"]
        for name, output in manifest["outputs"].items()
    )
