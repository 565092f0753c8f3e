"""The Template contract: messages -> spans, the one place where role strings and good/bad markers live.

One object gives the text and the loss weight of every piece of a training record, the prompt of a generation, the
strings that end one, and the Jinja chat template that is exported with the model; `parse` is the inverse. All of them
are read off the same few fields, so what is trained is what is served.

Koala (young-geng/koala_data_pipeline, create_hf_data_v2.py; EasyLM docs/koala.md), `_` standing for a space:

    BEGINNING_OF_CONVERSATION:_USER:_{question}_GPT:_{answer}</s>USER:_...
    BEGINNING_OF_CONVERSATION:_USER:_{question}_An_Unhelpful_Answer:_{answer}</s>

Koala tokenised the answer as a field of its own, which put SentencePiece's dummy space before it; here that space is
written out and belongs to the trained span, so that the joined text gives the same ids.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from easylm_like.data.conversation import Message, Quality, Role
from easylm_like.errors import UserError


class Why(StrEnum):
    """Why a span is trained or not."""

    SCAFFOLD = "scaffold"  # text of the template
    CONTEXT = "context"  # a user's or system's words
    ANSWER = "answer"  # the assistant's words, trained
    TERMINATOR = "terminator"  # end of a complete answer, trained with it
    WEIGHT_0 = "weight_0"  # an assistant message that asked not to be trained, and its terminator


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a rendered conversation: `weight` 1 is trained, `message` is the index it comes from."""

    text: str
    weight: int
    why: Why
    message: int | None = None
    quality: Quality | None = None


class RenderError(UserError):
    """A conversation that a template cannot hold; `reason` is the short word under which it is counted."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The tokenizer's own strings: `bos` may be missing, `eos` ends an answer, `reserved` must not occur in content."""

    bos: str | None
    eos: str
    reserved: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A prompt format. `markers` None means a document format: one assistant message and nothing around it."""

    name: str
    begin: str = ""
    user_prefix: str = ""
    user_suffix: str = ""
    good_marker: str | None = None
    bad_marker: str | None = None
    gap: str = ""

    def spans(self, messages: Sequence[Message], special: SpecialTokens) -> tuple[Span, ...]:
        """Render a whole conversation; the texts of the spans joined are the text that is tokenised.

        Raises:
            RenderError: the roles do not fit, an answer is empty, or a content holds a special token.
        """
        self._check(messages, special)
        spans = [Span((special.bos or "") + self.begin, 0, Why.SCAFFOLD)]
        for index, message in enumerate(messages):
            if message.role == Role.USER:
                spans += [
                    Span(self.user_prefix, 0, Why.SCAFFOLD, index),
                    Span(message.content, 0, Why.CONTEXT, index),
                    Span(self.user_suffix, 0, Why.SCAFFOLD, index),
                ]
            else:
                quality = message.quality or Quality.GOOD
                why = (Why.ANSWER, Why.TERMINATOR) if message.weight else (Why.WEIGHT_0, Why.WEIGHT_0)
                spans += [
                    Span(self._marker(quality), 0, Why.SCAFFOLD, index),
                    Span(self.gap + message.content, message.weight, why[0], index, quality),
                    Span(special.eos, message.weight, why[1], index, quality),
                ]
        return tuple(span for span in spans if span.text)

    def prompt(self, messages: Sequence[Message], special: SpecialTokens, quality: Quality = Quality.GOOD) -> str:
        """Return the text after which the model answers `messages` (the last a user's) under the marker `quality`."""
        if self.good_marker is None:
            raise RenderError("no_chat", f"the {self.name} template has no turns; use its text as the prompt")
        if not messages or messages[-1].role != Role.USER:
            raise RenderError("roles", "a prompt must end with a user message")
        return "".join(span.text for span in self.spans(messages, special)) + self._marker(quality)

    def stop_strings(self, special: SpecialTokens) -> tuple[str, ...]:
        """Return the strings that end an answer: the terminator, and a next turn that a weak model may invent."""
        return (special.eos, self.user_prefix.strip()) if self.user_prefix else (special.eos,)

    def read_answer(self, text: str, special: SpecialTokens) -> str:
        """Return the assistant's words in generated `text`: without the gap before them, up to a stop string.

        `text` is what decoding the whole adds to the decoded prompt; SentencePiece's decoding of the answer alone would
        already have lost the gap.
        """
        ends = [at for stop in self.stop_strings(special) if (at := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))].removeprefix(self.gap)

    def parse(self, text: str, special: SpecialTokens) -> tuple[Message, ...]:
        """Return the messages whose rendering is `text`; the inverse of joining `spans`.

        Raises:
            ValueError: `text` is not a complete rendering, or more than one conversation renders to it (a user wrote
                a marker into a message), so that no answer would be certain.
        """
        head = (special.bos or "") + self.begin
        if not text.startswith(head) or not text.endswith(special.eos) or not text.removeprefix(head):
            raise ValueError(f"not a complete rendering of the {self.name} template: {text[:80]!r}")
        turns = text.removeprefix(head).removesuffix(special.eos).split(special.eos)
        messages = tuple(message for turn in turns for message in self._parse_turn(turn))
        if "".join(span.text for span in self.spans(messages, special)) != text:
            raise ValueError(f"not a rendering of the {self.name} template: {text[:80]!r}")
        return messages

    def jinja(self, *, mark_answers: bool = False) -> str:
        """Return the Hugging Face chat template of the same format, on one line.

        A message's `quality` chooses its marker; `apply_chat_template(..., add_generation_prompt=True, quality="bad")`
        chooses the marker of the answer to come. With `mark_answers` the trained spans stand in transformers'
        `generation` blocks (for its assistant mask); readers other than transformers may not know that tag.
        """
        if self.good_marker is None:
            return "{{ bos_token }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
        begin, prefix, suffix, gap = map(_literal, (self.begin, self.user_prefix, self.user_suffix, self.gap))
        good, bad = _literal(self._marker(Quality.GOOD)), _literal(self._marker(Quality.BAD))
        answer = f"{{{{ {gap} + message['content'] + eos_token }}}}"
        if mark_answers:
            trained = f"{{% generation %}}{answer}{{% endgeneration %}}"
            answer = f"{{% if message['weight'] == 0 %}}{answer}{{% else %}}{trained}{{% endif %}}"
        order = f"{{{{ raise_exception('{self.name}: user and assistant must take turns, the user first') }}}}"
        reserved = "{{ raise_exception('a message must not contain ' + (bos_token or '') + ' or ' + eos_token) }}"
        return (
            f"{{{{ (bos_token or '') + {begin} }}}}{{% for message in messages %}}"
            "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}" + order + "{% endif %}"
            "{% if eos_token in message['content'] or (bos_token and bos_token in message['content']) %}"
            + reserved
            + "{% endif %}"
            f"{{% if message['role'] == 'user' %}}{{{{ {prefix} + message['content'] + {suffix} }}}}{{% else %}}"
            f"{{{{ {bad} if message['quality'] == 'bad' else {good} }}}}{answer}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {bad} if quality == 'bad' else {good} }}}}{{% endif %}}"
        )

    def _marker(self, quality: Quality) -> str:
        return (self.bad_marker if quality == Quality.BAD else self.good_marker) or ""

    def _check(self, messages: Sequence[Message], special: SpecialTokens) -> None:
        roles = [message.role for message in messages]
        if self.good_marker is None and roles != [Role.ASSISTANT]:
            raise RenderError("roles", f"the {self.name} template takes one assistant message, got {', '.join(roles)}")
        turns = [Role.ASSISTANT if i % 2 else Role.USER for i in range(len(roles))]
        if self.good_marker is not None and roles != turns:
            raise RenderError(
                "roles", f"the {self.name} template takes user and assistant in turns, got {', '.join(roles)}"
            )
        for message in messages:
            if message.role == Role.ASSISTANT and not message.content:
                raise RenderError("empty_answer", "an assistant message is empty")
            for token in special.reserved | {special.eos}:
                if token in message.content:
                    raise RenderError("special_token", f"a message contains the special token {token!r}")

    def _parse_turn(self, turn: str) -> tuple[Message, ...]:
        if self.good_marker is None:
            return (Message(Role.ASSISTANT, turn),)
        body = turn.removeprefix(self.user_prefix)
        ends = [
            (at, quality, marker)
            for quality in Quality
            for marker in [self.user_suffix + self._marker(quality) + self.gap]
            for at in _occurrences(body, marker)
        ]
        if not turn.startswith(self.user_prefix) or len(ends) != 1:
            raise ValueError(f"{len(ends)} places where a {self.name} answer could begin in {turn[:80]!r}")
        at, quality, marker = ends[0]
        return Message(Role.USER, body[:at]), Message(Role.ASSISTANT, body[at + len(marker) :], quality)


def _occurrences(text: str, part: str) -> list[int]:
    return [i for i in range(len(text)) if text.startswith(part, i)]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


KOALA = Template(
    name="koala",
    begin="BEGINNING OF CONVERSATION: ",
    user_prefix="USER: ",
    user_suffix=" ",
    good_marker="GPT:",
    bad_marker="An Unhelpful Answer:",
    gap=" ",
)
PLAIN = Template(name="plain")  # a document between BOS and EOS, every token trained: pretraining text
TEMPLATES = {template.name: template for template in (KOALA, PLAIN)}


def get_template(name: str) -> Template:
    """Return the template called `name`; a UserError lists the known ones."""
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}; known templates are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
