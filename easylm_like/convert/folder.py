"""Hugging Face folders as a Source: those of this library, of transformers, of anybody."""

from functools import partial
from pathlib import Path

from easylm_like.convert.reference import reference_logits
from easylm_like.convert.source import Hints, Source
from easylm_like.data.template import get_template
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.folder import ORIGIN_FILE, open_weights, path_digest, read_json, read_shape


def open_folder(folder: Path, hints: Hints) -> Source:
    """Return the model of a folder with config.json and its weights as safetensors or as PyTorch's .bin files.

    Raises:
        UserError: something is missing, damaged or of another shape, or is not computed by this library.
    """
    config = read_shape(folder)
    tensors = open_weights(folder, config)
    earlier = _optional_json(folder / ORIGIN_FILE)
    template = hints.template or earlier.get("template")
    origin: dict[str, object] = {"path": str(folder), "digest": path_digest(folder)}
    if "run" in earlier:
        origin["run"] = earlier["run"]
    return Source(
        path=folder,
        format="Hugging Face folder",
        config=config,
        tensors=tensors,
        logits=partial(reference_logits, read_json(folder / "config.json"), tensors),
        tokenizer=_tokenizer(folder, hints),
        template=get_template(template) if isinstance(template, str) else None,
        chat_template=chat_template(folder),
        stop_ids=stop_ids(folder),
        origin=origin,
    )


def _tokenizer(folder: Path, hints: Hints) -> Tokenizer | None:
    if hints.tokenizer is not None:
        return load_tokenizer(hints.tokenizer)
    known = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return load_tokenizer(folder) if known else None


def chat_template(folder: Path) -> str | None:
    """Return the folder's own Jinja: a file of its own, or, as until 2024, a field of the tokenizer's."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    found = _optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def stop_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that a folder's generation_config.json says end an answer; a UserError if it says nonsense."""
    found = _optional_json(folder / "generation_config.json").get("eos_token_id")
    told = found if isinstance(found, list) else [] if found is None else [found]
    ids = tuple(one for one in told if isinstance(one, int) and not isinstance(one, bool))
    if len(ids) != len(told):
        raise UserError(f"{folder}/generation_config.json: eos_token_id must be one id or several, got {found!r}")
    return ids


def _optional_json(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}
