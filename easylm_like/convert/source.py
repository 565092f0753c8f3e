"""What a conversion begins with: one model, whatever the format it lies in.

`open_source` tells the formats apart. Each has a module that names its arrays by Hugging Face's names, in Hugging
Face's layout, and that can compute logits in the layout it came in, so that a mistake between the two is seen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from easylm_like.data.template import Template
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.hf.tensors import Tensors
from easylm_like.model.config import LlamaConfig


@dataclass(frozen=True, slots=True)
class Hints:
    """What the user says about a model that its files may not: more than that, it overrides what they say."""

    tokenizer: Path | None = None
    template: str | None = None
    shape: str | None = None  # a preset's name or the path of a config.json
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model to convert, nothing of its weights read yet.

    `tensors` have Hugging Face's names and layout and are exactly those that `config` needs, the vocabulary without
    padding. `logits` maps ids [..., T] to fp32 logits [..., T, V], computed from the format's own arrays as they lie.
    """

    path: Path
    format: str  # for sentences: "Hugging Face folder"
    config: LlamaConfig
    tensors: Tensors
    logits: Callable[[np.ndarray], np.ndarray]
    tokenizer: Tokenizer | None = None
    template: Template | None = None  # the one it was trained with, where that is known
    chat_template: str | None = None  # Jinja to pass on, where the template is not one of ours
    stop_ids: tuple[int, ...] = ()  # ids that end an answer beside the tokenizer's EOS
    origin: Mapping[str, object] = field(default_factory=dict)  # what made it, for conversion.json and the card
