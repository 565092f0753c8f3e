"""The shape of a model whose files do not tell it, from the user's word."""

from pathlib import Path

from easylm_like.errors import UserError
from easylm_like.hf.config import config_from_hf
from easylm_like.hf.folder import read_json
from easylm_like.model.config import LlamaConfig
from easylm_like.model.presets import PRESETS


def read_hinted_shape(hint: str) -> LlamaConfig:
    """Return the preset of that name, or the shape that a config.json, or the one of a folder, describes.

    Raises:
        UserError: it is neither, or a config.json of a model that this library does not compute.
    """
    if hint in PRESETS:
        return PRESETS[hint]
    path = Path(hint) / "config.json" if Path(hint).is_dir() else Path(hint)
    if not path.is_file():
        raise UserError(f"shape {hint!r} is no file and no known preset; presets are {', '.join(PRESETS)}")
    return config_from_hf(read_json(path), str(path))
