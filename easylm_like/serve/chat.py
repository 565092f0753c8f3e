"""Messages or text -> the ids that a model continues, by the template that it was trained with.

A model that was trained here gets exactly the ids of its training records. One that came with a Jinja chat template
gets what `AutoTokenizer.apply_chat_template` of transformers gives, by the same code.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from easylm_like.data.conversation import Message, Quality, Role
from easylm_like.data.template import RenderError, Template
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError

Fields = Mapping[str, object]  # a message as OpenAI writes it: role, content and what else a template may read


class Speaker(Protocol):
    """A model as far as its prompts go: an Engine, or a model that was only opened."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into ids."""

    @property
    def template(self) -> Template | None:
        """The template of this library that it was trained with."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja that came with it."""


class PromptError(UserError):
    """Messages that a model's template cannot hold; `field` is the path of what is wrong, `code` a word for it."""

    def __init__(self, sentence: str, *, field: str = "messages", code: str | None = None) -> None:
        super().__init__(sentence)
        self.field = field
        self.code = code


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model continues (int32 [T]), the strings that end its answer, and what is removed from its beginning."""

    ids: np.ndarray
    stop: tuple[str, ...] = ()
    gap: str = ""


def can_chat(model: Speaker) -> bool:
    """Return whether the model has a template for messages."""
    return bool(model.template.markers) if model.template is not None else model.chat_template is not None


def markers(model: Speaker) -> tuple[str, ...]:
    """Return what `marker` may be for this model."""
    qualities = model.template.qualities if model.template is not None else ()
    return tuple(str(quality) for quality in qualities)


def chat_prompt(
    model: Speaker,
    messages: Sequence[Fields],
    *,
    marker: str | None = None,
    wording: int = 0,
    tools: Sequence[Fields] = (),
    documents: Sequence[Fields] = (),
) -> Prompt:
    """Return the prompt after which `model` answers `messages`.

    A message is {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": text}; an answer in the
    history may carry `quality` and `wording`. `marker` ("good", the default, or "bad") and `wording` choose what
    introduces the answer to come. `tools`, `documents` and tool calls need a Jinja template that knows them.

    Raises:
        PromptError: the template cannot hold this, or the model has no template.
    """
    messages = [{**message, "role": _role(message)} for message in messages]
    if model.template is not None:
        if tools or documents:
            field = "tools" if tools else "documents"
            raise PromptError(f"the {model.template.name} template has no place for {field}", field=field)
        return _trained_prompt(model.tokenizer, model.template, messages, marker, wording)
    if model.chat_template is None:
        raise PromptError(
            "this model has no chat template: start the server with --template=, or use /v1/completions",
            code="no_chat_template",
        )
    if marker is not None or wording:
        field = "wording" if marker is None else "marker"
        raise PromptError(f"this model was not trained with markers: leave {field} out", field=field)
    for field, given in (("tools", tools), ("documents", documents)):
        if given and field not in model.chat_template:
            raise PromptError(f"this model's chat template has no place for {field}", field=field)
    text = _render(model.tokenizer, model.chat_template, messages, tools, documents)
    return Prompt(_ids(model.tokenizer, text))


def text_prompt(model: Speaker, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> np.ndarray:
    """Return the ids of a plain prompt, int32 [T].

    Text that does not begin with the BOS token gets one where the model has seen it in training: if it was trained
    here, or if its tokenizer.json adds one to plain text (LLaMA's do, SmolLM2's does not), as transformers does. Ids
    are taken as they are.

    Raises:
        PromptError: an id is not in the vocabulary.
    """
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        ids, bos = _ids(tokenizer, prompt), tokenizer.bos_id
        begun = bos is None or prompt.startswith(str(tokenizer.special.bos))
        if add_special_tokens and not begun and (model.template is not None or _adds_bos(tokenizer)):
            return np.concatenate([np.array([bos], np.int32), ids])
        return ids
    wrong = [id_ for id_ in prompt if not 0 <= id_ < tokenizer.vocab_size]
    if wrong:
        got = str(wrong[0])[:40]
        raise PromptError(f"prompt must hold ids from 0 to {tokenizer.vocab_size - 1}, got {got}", field="prompt")
    return np.array(prompt, np.int32)


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode([text])[0][0]


def _adds_bos(tokenizer: Tokenizer) -> bool:
    return tokenizer.backend.encode("a", add_special_tokens=True).ids[0] == tokenizer.bos_id


def _role(message: Fields) -> str:
    role = str(message["role"])
    return str(Role.SYSTEM) if role == "developer" else role  # OpenAI's later word for the same


def _trained_prompt(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Fields], marker: str | None, wording: int
) -> Prompt:
    told = [_message(template, f"messages[{number}]", message) for number, message in enumerate(messages)]
    quality = Quality.GOOD if marker is None else Quality(marker)
    try:
        text = template.prompt(told, tokenizer.special, quality, wording)
    except RenderError as error:
        field = {"no_bad_marker": "marker", "wording": "wording"}.get(error.reason, "messages")
        raise PromptError(str(error), field=field, code=error.reason) from error
    stop = tuple(stop for stop in template.stop_strings(tokenizer.special) if stop != tokenizer.special.eos)
    return Prompt(_ids(tokenizer, text), stop, template.gap)


def _message(template: Template, path: str, message: Fields) -> Message:
    role, content = str(message["role"]), message.get("content")
    if role not in set(Role):
        roles = ", ".join(Role)
        raise PromptError(
            f"{path}.role must be one of {roles} for the {template.name} template, got {role}", field=path
        )
    if not isinstance(content, str):
        raise PromptError(
            f"{path}.content must be text: the {template.name} template has no place for tool calls", field=path
        )
    quality, wording = message.get("quality"), message.get("wording") or 0
    assert isinstance(wording, int)
    return Message(Role(role), content, None if quality is None else Quality(str(quality)), wording=wording)


def _render(
    tokenizer: Tokenizer,
    chat_template: str,
    messages: Sequence[Fields],
    tools: Sequence[Fields],
    documents: Sequence[Fields],
) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template  # seconds to import

    config = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    special = {name: config[name] for name in ("bos_token", "eos_token", "unk_token") if config.get(name) is not None}
    try:
        rendered = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            tools=[dict(tool) for tool in tools] or None,
            documents=[dict(document) for document in documents] or None,
            chat_template=chat_template,
            add_generation_prompt=True,
            **special,
        )[0]
    except Exception as error:  # a template is a program of the model's author: it may raise whatever it likes
        raise PromptError(f"this model's chat template does not take these messages: {error}") from error
    return str(rendered[0])
