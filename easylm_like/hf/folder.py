"""Hugging Face folders, read strictly and written whole.

FOLDER/config.json, generation_config.json, model.safetensors (or shards with model.safetensors.index.json)
       tokenizer.json, tokenizer_config.json, tokenizer.model (if there is one), chat_template.jinja
       README.md (the model card), conversion.json (what made it, and the proof), files.json (a digest of every file)
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from easylm_like.data.tokenizer import Tokenizer
from easylm_like.digests import DIGESTS, find_damage
from easylm_like.errors import UserError
from easylm_like.hf.config import config_from_hf, config_to_hf
from easylm_like.hf.index import read_indexed
from easylm_like.hf.keys import Stack, check_names, to_ours
from easylm_like.hf.safetensors_files import open_safetensors
from easylm_like.hf.tensors import DTYPES, Tensor
from easylm_like.hf.torch_files import open_torch_folder
from easylm_like.model.config import LlamaConfig

ORIGIN_FILE = "conversion.json"
SHARD_BYTES = 5 * 10**9  # what transformers 4 cut at: a file of it passes through every tool


def write_folder(
    folder: Path,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    *,
    dtype: str,
    stop_ids: Sequence[int],
    chat_template: str | None,
) -> None:
    """Write configs, tokenizer and chat template into the existing `folder`; `stop_ids` end an answer.

    Raises:
        UserError: no `model_type` has this combination of switches.
    """
    write_json(folder / "config.json", config_to_hf(config, tokenizer, dtype))
    tokenizer.save(folder)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    ends: object = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "do_sample": False},
    )


def read_shape(folder: Path) -> LlamaConfig:
    """Return the shape that a folder's config.json describes; a UserError says what is not computed of it."""
    return config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


def open_weights(folder: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """Return exactly the weights of a model like `config`, from safetensors or from PyTorch's .bin files.

    Raises:
        UserError: a file is missing or damaged, or a weight is missing, unknown, doubled or mis-shaped.
    """
    tensors = open_files(folder)
    # Folders of 2023 carry RoPE's frequencies, which are computed, and some that tie the embeddings carry them twice.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    tied = [tensors[name] for name in ("lm_head.weight", "model.embed_tokens.weight") if name in tensors]
    if config.tie_embeddings and len(tied) == 2 and np.array_equal(tied[0].read(), tied[1].read()):
        del tensors["lm_head.weight"]
    check_names(tensors, config, str(folder))
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in DTYPES.values()]:
        raise UserError(f"{folder}: {', '.join(odd)}: expected weights of {', '.join(DTYPES)}")
    return tensors


def open_params(folder: Path, config: LlamaConfig) -> dict[str, Stack]:
    """Return our params of a folder, nothing of them read yet; a UserError says what does not fit."""
    return to_ours(open_weights(folder, config), config, str(folder))


def open_files(folder: Path, stem: str = "model") -> dict[str, Tensor]:
    """Return every array of STEM.safetensors, or of the shards in its index, by its name, none of them read yet.

    Raises:
        UserError: a file is missing or damaged, or is not what files.json says; or a name is in two of them.
    """
    if (folder / DIGESTS).is_file() and (damage := find_damage(folder, stem)):
        raise UserError(f"{'; '.join(damage)}; copy it again, or delete {DIGESTS} there if you changed it")
    index, whole = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if not (index.is_file() or whole.is_file()) and any(folder.glob("pytorch_model*.bin*")):
        return open_torch_folder(folder)
    return read_indexed(index, open_safetensors) if index.is_file() else open_safetensors(whole)


def path_digest(path: Path) -> str:
    """Return a digest that changes when the model in a folder or a file does, without reading its weights."""
    if (path / DIGESTS).is_file():
        return hashlib.sha256((path / DIGESTS).read_bytes()).hexdigest()
    found = [path] if path.is_file() else path.glob("*")
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found)
    return hashlib.sha256(repr(files).encode()).hexdigest()


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


def write_json(path: Path, fields: Mapping[str, object]) -> None:
    """Write a JSON object as people read it."""
    path.write_text(json.dumps(fields, indent=2) + "\n")
