"""Load a model from wherever it is: a run's work directory, or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from easylm_like.data.template import Template, get_template
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.folder import ORIGIN_FILE, open_params, path_digest, read_json, read_shape
from easylm_like.hf.keys import Stack
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import Params
from easylm_like.train import checkpoint


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
        step, info = checkpoint.read_run_info(path / "checkpoints")
        shape, recorded = checkpoint.shape_from_json(info["shape"]), info["template"]
        weights: dict[str, Stack] = checkpoint.open_params(path / "checkpoints", step)
        tokenizer = load_tokenizer(path / "tokenizer")
    elif (path / "config.json").is_file():
        shape = read_shape(path)
        weights = open_params(path, shape)
        tokenizer = load_tokenizer(path)
        recorded = read_json(path / ORIGIN_FILE).get("template") if (path / ORIGIN_FILE).is_file() else None
    else:
        raise UserError(f"{path}: neither a work directory (checkpoints/) nor a Hugging Face folder (config.json)")
    name = template or recorded
    if not isinstance(name, str):
        raise UserError(f"{path}: nothing there says which template it was trained with; name it with --template=")
    params = {key: jnp.asarray(weight.read(), jnp.float32) for key, weight in weights.items()}
    return LoadedModel(path, shape, params, tokenizer, get_template(name))


def model_digest(path: str | Path) -> str:
    """Return a digest that changes when the model at `path` does, without reading its weights."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        step, _ = checkpoint.read_run_info(path / "checkpoints")
        return checkpoint.saved_digest(path / "checkpoints", step)
    return path_digest(path)
