"""Which format a path is in."""

from dataclasses import replace
from pathlib import Path

from easylm_like.convert.source import Hints, Source
from easylm_like.errors import UserError
from easylm_like.hf.folder import path_digest


def open_source(path: Path, hints: Hints) -> Source:
    """Return the model at `path`, whatever format this library reads it lies in.

    Its `origin` has a digest that changes with the model, by which a conversion knows what it has done already.

    Raises:
        UserError: it is of no such format, or something of it is missing, damaged or not computed here.
    """
    source = _open(path, hints)
    return replace(source, origin={"digest": path_digest(source.path), **source.origin})


def _open(path: Path, hints: Hints) -> Source:
    if path.is_dir():
        return _open_directory(path, hints)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        from easylm_like.convert.gguf.read import open_gguf

        return open_gguf(path, hints)
    if path.suffix in (".pth", ".safetensors") or magic[:2] == b"PK":
        raise UserError(
            f"{path}: one file of weights; give the folder that holds it with its config.json or params.json"
        )
    if path.suffix == ".bin":
        from easylm_like.convert.llama2c import open_llama2c

        return open_llama2c(path, hints)
    from easylm_like.convert.easylm import open_easylm

    return open_easylm(path, hints)


def _open_directory(path: Path, hints: Hints) -> Source:
    from easylm_like.convert.folder import open_folder
    from easylm_like.convert.orbax import open_orbax

    path = path.absolute()
    if (path / "checkpoints").is_dir():
        return open_orbax(path, hints)
    if path.name.isdigit() and (path / "run.json").is_file():
        return open_orbax(path.parent.parent, Hints(hints.tokenizer, hints.template, hints.shape, int(path.name)))
    if (path / "params.json").is_file() or any(path.glob("consolidated.*.pth")):
        from easylm_like.convert.meta import open_meta

        return open_meta(path, hints)
    if (path / "config.json").is_file():
        return open_folder(path, hints)
    if any(path.glob("streaming_*")):
        from easylm_like.convert.easylm import open_easylm

        return open_easylm(path, hints)
    if len(files := sorted(path.glob("*.gguf"))) == 1:
        return _open(files[0], hints)
    raise UserError(
        f"{path}: expected a run's work directory (checkpoints/), a Hugging Face folder (config.json), Meta's "
        "(params.json), EasyLM's (streaming_params) or one .gguf file in it"
    )
