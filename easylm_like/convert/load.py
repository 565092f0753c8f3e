"""Load a model from wherever it is: a run's work directory, one of its checkpoints, or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from easylm_like.convert.folder import chat_template, stop_ids
from easylm_like.data.template import Template, get_template
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.folder import ORIGIN_FILE, open_weights, path_digest, read_json, read_shape
from easylm_like.hf.keys import Stacks, to_ours, to_theirs
from easylm_like.hf.tensors import Tensors
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import Params
from easylm_like.train import checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel:
    """A model whose weights are still in their files.

    `stacks` are our params, `tensors` the same as one [out, in] matrix a layer, by Hugging Face's names. `template` is
    the one it was trained with, where that is one of ours; else `chat_template` may be the Jinja that came with it.
    `stop_ids` end an answer, the tokenizer's EOS among them.
    """

    path: Path
    config: LlamaConfig
    stacks: Stacks
    tensors: Tensors
    tokenizer: Tokenizer
    template: Template | None
    chat_template: str | None
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to compute in fp32, with the tokenizer and the template it was trained with."""

    path: Path
    config: LlamaConfig
    params: Params
    tokenizer: Tokenizer
    template: Template


def open_model(path: str | Path, template: str | None = None) -> OpenModel:
    """Open a work directory (its latest checkpoint), one of its checkpoints, or a Hugging Face folder.

    `template` overrides the recorded one.

    Raises:
        UserError: neither is there, or something is damaged.
    """
    path = Path(path)
    chosen = get_template(template) if template else None
    if (path / "checkpoints").is_dir():
        return _open_run(path, path, None, chosen)
    if path.absolute().name.isdigit() and (path / checkpoint.RUN).is_file():
        return _open_run(path, path.absolute().parent.parent, int(path.absolute().name), chosen)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: neither a work directory (checkpoints/) nor a Hugging Face folder (config.json)")
    config, tokenizer = read_shape(path), load_tokenizer(path)
    recorded = read_json(path / ORIGIN_FILE).get("template") if (path / ORIGIN_FILE).is_file() else None
    tensors = open_weights(path, config)
    return OpenModel(
        path=path,
        config=config,
        stacks=to_ours(tensors, config, str(path)),
        tensors=tensors,
        tokenizer=tokenizer,
        template=chosen or (get_template(recorded) if isinstance(recorded, str) else None),
        chat_template=chat_template(path),
        stop_ids=tuple(dict.fromkeys((tokenizer.eos_id, *stop_ids(path)))),
    )


def load_model(path: str | Path, template: str | None = None) -> LoadedModel:
    """Read what `open_model` opens, weights in fp32.

    Raises:
        UserError: it cannot be opened, or nobody recorded the template and none is given.
    """
    model = open_model(path, template)
    if model.template is None:
        raise UserError(f"{path}: nothing there says which template it was trained with; name it with --template=")
    params = {key: jnp.asarray(weight.read(), jnp.float32) for key, weight in model.stacks.items()}
    return LoadedModel(model.path, model.config, params, model.tokenizer, model.template)


def model_digest(path: str | Path) -> str:
    """Return a digest that changes when the model at `path` does, without reading its weights."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        step, _ = checkpoint.read_run_info(path / "checkpoints")
        return checkpoint.saved_digest(path / "checkpoints", step)
    return path_digest(path)


def _open_run(path: Path, run: Path, step: int | None, template: Template | None) -> OpenModel:
    step, info = checkpoint.read_run_info(run / "checkpoints", step)
    config = checkpoint.shape_from_json(info["shape"])
    stacks = checkpoint.open_params(run / "checkpoints", step)
    tokenizer = load_tokenizer(run / "tokenizer")
    return OpenModel(
        path=path,
        config=config,
        stacks=stacks,
        tensors=to_theirs(stacks, config),
        tokenizer=tokenizer,
        template=template or get_template(str(info["template"])),
        chat_template=None,
        stop_ids=(tokenizer.eos_id,),
    )
