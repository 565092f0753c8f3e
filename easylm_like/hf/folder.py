"""Hugging Face folders, read strictly and written whole.

FOLDER/config.json, generation_config.json, model.safetensors
       tokenizer.json, tokenizer_config.json, tokenizer.model (if there is one), chat_template.jinja
       easylm_like.json   what made it: template, step, resolved config, versions
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from easylm_like.data.template import Template
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.config import config_from_hf, config_to_hf
from easylm_like.hf.keys import to_ours, to_theirs
from easylm_like.model.config import LlamaConfig

ORIGIN_FILE = "easylm_like.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def write_folder(
    folder: Path,
    config: LlamaConfig,
    params: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    template: Template,
    *,
    dtype: str,
    origin: Mapping[str, object],
) -> None:
    """Write every file of a Hugging Face model into the existing `folder`; `origin` goes into easylm_like.json."""
    fields = config_to_hf(config, tokenizer, dtype)  # first: it may refuse
    weights = {name: array.astype(DTYPES[dtype]) for name, array in to_theirs(params, config)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)  # safetensors makes it readable by its owner alone
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(template.jinja())
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "do_sample": False}
    _write_json(folder / "config.json", fields)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / ORIGIN_FILE, {"template": template.name, **origin})


def read_shape(folder: Path) -> LlamaConfig:
    """Return the shape that a folder's config.json describes; a UserError says what is not computed of it."""
    return config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


def read_params(folder: Path, config: LlamaConfig) -> dict[str, np.ndarray]:
    """Return our params of a Hugging Face folder.

    Raises:
        UserError: a file is missing or damaged, or a weight is missing, unknown or mis-shaped.
    """
    # Folders of 2023 carry RoPE's frequencies, which are computed, and some that tie the embeddings carry them twice.
    weights = {name: a for name, a in read_weights(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    head, embed = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if config.tie_embeddings and head is not None and embed is not None and np.array_equal(head, embed):
        del weights["lm_head.weight"]
    return to_ours(weights, config, str(folder))


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Return every array of the folder's safetensors files by Hugging Face's name; a doubled name is a UserError."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        places = read_json(index).get("weight_map")
        files = sorted(set(places.values())) if isinstance(places, dict) else []
    weights: dict[str, np.ndarray] = {}
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: no such file; expected the weights as safetensors")
        try:
            with safe_open(folder / file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    if name in weights:
                        raise UserError(f"{folder / file}: weight {name} is in another file of the folder too")
                    weights[name] = tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{folder / file}: damaged or cut off ({error}); copy it again") from error
    return weights


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file; a UserError names the file."""
    try:
        fields = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a JSON object")
    return fields


def _write_json(path: Path, fields: Mapping[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")
