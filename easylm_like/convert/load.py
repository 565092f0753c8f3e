"""Load a model from wherever it is: a run's work directory, or a Hugging Face folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from easylm_like.data.template import Template, get_template
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.folder import ORIGIN_FILE, read_json, read_params, read_shape
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import Params
from easylm_like.train.checkpoint import load_params, read_run_info, saved_digest, shape_from_json


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to compute in fp32, with the tokenizer and the template it was trained with."""

    path: Path
    config: LlamaConfig
    params: Params
    tokenizer: Tokenizer
    template: Template


def load_model(path: str | Path, template: str | None = None) -> LoadedModel:
    """Read a work directory (its latest checkpoint) or a Hugging Face folder; `template` overrides the recorded one.

    Raises:
        UserError: neither is there, something is damaged, or nobody recorded the template and none is given.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        step, info = read_run_info(path / "checkpoints")
        shape, recorded = shape_from_json(info["shape"]), info["template"]
        weights = load_params(path / "checkpoints", step)
        tokenizer = load_tokenizer(path / "tokenizer")
    elif (path / "config.json").is_file():
        shape = read_shape(path)
        weights = read_params(path, shape)
        tokenizer = load_tokenizer(path)
        recorded = read_json(path / ORIGIN_FILE).get("template") if (path / ORIGIN_FILE).is_file() else None
    else:
        raise UserError(f"{path}: neither a work directory (checkpoints/) nor a Hugging Face folder (config.json)")
    name = template or recorded
    if not isinstance(name, str):
        raise UserError(f"{path}: nothing there says which template it was trained with; name it with --template=")
    params = {key: jnp.asarray(weight, jnp.float32) for key, weight in weights.items()}
    return LoadedModel(path, shape, params, tokenizer, get_template(name))


def model_digest(path: str | Path) -> str:
    """Return a digest that changes when the model at `path` does, without reading its weights."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        step, _ = read_run_info(path / "checkpoints")
        return saved_digest(path / "checkpoints", step)
    if (path / ORIGIN_FILE).is_file():
        return hashlib.sha256((path / ORIGIN_FILE).read_bytes()).hexdigest()
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in path.glob("*"))
    return hashlib.sha256(repr(files).encode()).hexdigest()
