"""The proof that a converted model is the same model; without it a conversion does not succeed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easylm_like.convert.reference import reference_logits
from easylm_like.data.conversation import Message, Quality, Role
from easylm_like.data.template import Template
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.folder import read_json, read_weights
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import GraphDef, Params, abstract_model

# fp32 on both sides; the bound is for rounding that grows with depth, a wrong layout is off by the logits' own size
TOLERANCE = 1e-3

PROBES: tuple[tuple[Message, ...], ...] = (
    (Message(Role.USER, "What is the capital of France?"), Message(Role.ASSISTANT, "The capital of France is Paris.")),
    (
        Message(Role.USER, "Repeat:  two  spaces,\nline, naïve café, 1234567, 你好"),
        Message(Role.ASSISTANT, "two  spaces,\n\n\tline", Quality.BAD),
        Message(Role.USER, "GPT: again?"),
        Message(Role.ASSISTANT, "No."),
    ),
)


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared: fp32 logits at `positions` places, differing by at most `largest` of the logits' spread."""

    positions: int
    largest: float


def verify_logits(
    config: LlamaConfig, params: dict[str, np.ndarray], folder: Path, prompts: Sequence[np.ndarray]
) -> Proof:
    """Compare our model's logits with those of the folder's files, computed in plain NumPy from what lies on disk.

    Raises:
        UserError: they differ by more than TOLERANCE times the standard deviation of the logits.
    """
    fields, weights = read_json(folder / "config.json"), read_weights(folder)
    graphdef, _, _ = abstract_model(config)
    dtype = next(iter(weights.values())).dtype
    ours = {name: jnp.asarray(weight.astype(dtype).astype(np.float32)) for name, weight in params.items()}
    differences = []
    for ids in prompts:
        with jax.default_matmul_precision("highest"):  # accelerators round the factors of fp32 products otherwise
            got = np.asarray(_logits(graphdef, ours, jnp.asarray(ids)))
        want = reference_logits(fields, weights, ids)
        differences.append(np.max(np.abs(want - got)) / np.std(want))
    largest = float(np.max(differences))
    if not largest <= TOLERANCE:  # also when it is not a number, which np.max passes on and max() would not
        raise UserError(
            f"{folder}: logits differ by {largest:.2e} of their spread, at most {TOLERANCE:.0e} is rounding; "
            "nothing was written"
        )
    return Proof(sum(map(len, prompts)), largest)


def verify_tokenizer(folder: Path, tokenizer: Tokenizer, template: Template) -> None:
    """Check that transformers, reading the folder, gives the ids that this library trains and generates with.

    Raises:
        UserError: a conversation or a prompt has other ids.
    """
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(folder)
    for messages in _probes(template):
        chat = [{"role": m.role.value, "content": m.content, "quality": m.quality} for m in messages]
        text = "".join(span.text for span in template.spans(messages, tokenizer.special))
        pairs = [(text, theirs.apply_chat_template(chat, return_dict=True)["input_ids"])]
        for quality in template.qualities:
            prompt = template.prompt(messages[:-1], tokenizer.special, quality)
            options = {"add_generation_prompt": True, "quality": quality.value, "return_dict": True}
            pairs.append((prompt, theirs.apply_chat_template(chat[:-1], **options)["input_ids"]))
        for text, ids in pairs:
            ours = tokenizer.encode([text])[0][0].tolist()
            if ours != list(ids):
                raise UserError(f"{folder}: transformers reads {text!r} as {list(ids)}, training used {ours}")


def probe_prompts(tokenizer: Tokenizer, template: Template, limit: int) -> list[np.ndarray]:
    """Return the ids of the probe conversations, at most `limit` each, for `verify_logits`."""
    texts = ["".join(s.text for s in template.spans(chat, tokenizer.special)) for chat in _probes(template)]
    return [ids[:limit] for ids, _ in tokenizer.encode(texts)]


def _probes(template: Template) -> list[tuple[Message, ...]]:
    """Return the probes in a form that the template can hold: a document, one turn, without what it cannot mark."""
    part = slice(1, 2) if not template.markers else slice(0, 2) if template.single_turn else slice(None)
    return [
        tuple(m if m.quality in template.qualities else replace(m, quality=None) for m in chat[part]) for chat in PROBES
    ]


@partial(jax.jit, static_argnums=0)
def _logits(graphdef: GraphDef, params: Params, ids_T: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    places = jnp.ones_like(ids_T)[None], jnp.arange(ids_T.size)[None]
    return model.logits(model(ids_T[None], places)[0])[0]
