"""The Template contract: messages -> spans, the one place where role strings and good/bad markers live.

One object gives the text and the loss weight of every piece of a training record, the prompt of a generation, the
strings that end one, and the Jinja chat template that is exported with the model; `parse` is the inverse. All of them
are read off the same few fields, so what is trained is what is served. The published formats stand at the end.

Koala and Chain of Hindsight tokenised the answer as a field of its own, which put SentencePiece's dummy space before
it; here that space (`gap`) is written out and belongs to the trained span, so that the joined text gives the same ids.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from easylm_like.data.conversation import Message, Quality, Role
from easylm_like.errors import UserError


class Why(StrEnum):
    """Why a span is trained or not."""

    SCAFFOLD = "scaffold"  # text of the template
    CONTEXT = "context"  # a user's or system's words
    ANSWER = "answer"  # the assistant's words, trained
    TERMINATOR = "terminator"  # end of a complete answer, trained with it
    WEIGHT_0 = "weight_0"  # an assistant message that asked not to be trained, and its terminator


class Span(NamedTuple):  # a third of a frozen dataclass's time to make, and every record makes eight
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
    """A prompt format.

    `markers` are the wordings, the plain one first, of what introduces a good and a bad answer; the second is None in
    a format that has nothing for bad ones. No markers at all: a document, one assistant message and nothing around it.
    A format with bad markers may show several answers to one message, one after the other. `system` is what stands
    before the first turn if the conversation has no system message of its own (None: the format knows none).
    `begin_if` (part, text) puts `text` in the place of `begin` if the first message holds `part`.
    """

    name: str
    begin: str = ""
    begin_if: tuple[str, str] | None = None
    system: str | None = None
    system_suffix: str = ""
    user_prefix: str = ""
    user_suffix: str = ""
    markers: tuple[tuple[str, str | None], ...] = ()
    gap: str = ""
    single_turn: bool = False

    @property
    def good_marker(self) -> str | None:
        """The plain wording before a good answer; None in a document format."""
        return self.markers[0][0] if self.markers else None

    @property
    def qualities(self) -> tuple[Quality, ...]:
        """The qualities that an answer can be asked for in."""
        return tuple(Quality) if self._runs else tuple(Quality)[: len(self.markers)]

    def spans(self, messages: Sequence[Message], special: SpecialTokens) -> tuple[Span, ...]:
        """Render a whole conversation; the texts of the spans joined are the text that is tokenised.

        A bad answer of weight 0 is shown even where nothing can mark it: it was said, and nothing of it is learnt.

        Raises:
            RenderError: the roles do not fit, an answer is empty, a content holds a special token, or the template
                has no bad marker for a trained bad answer or not that wording of it.
        """
        self._check(messages, special)
        own_system = bool(messages) and messages[0].role == Role.SYSTEM
        default = "" if self.system is None or own_system else self.system + self.system_suffix
        first = messages[0].content if messages else ""
        begin = self.begin_if[1] if self.begin_if and self.begin_if[0] in first else self.begin
        spans = [Span((special.bos or "") + begin + default, 0, Why.SCAFFOLD)]
        for index, message in enumerate(messages):
            if message.role == Role.ASSISTANT:
                weight, quality = message.weight, message.quality or Quality.GOOD
                why = (Why.ANSWER, Why.TERMINATOR) if weight else (Why.WEIGHT_0, Why.WEIGHT_0)
                spans += (
                    Span(self._marker(quality, message.wording), 0, Why.SCAFFOLD, index),
                    Span(self.gap + message.content, weight, why[0], index, quality),
                    Span(special.eos, weight, why[1], index, quality),
                )
            else:
                user = message.role == Role.USER
                spans += (
                    Span(self.user_prefix if user else "", 0, Why.SCAFFOLD, index),
                    Span(message.content, 0, Why.CONTEXT, index),
                    Span(self.user_suffix if user else self.system_suffix, 0, Why.SCAFFOLD, index),
                )
        return tuple([span for span in spans if span.text])

    def prompt(
        self, messages: Sequence[Message], special: SpecialTokens, quality: Quality = Quality.GOOD, wording: int = 0
    ) -> str:
        """Return the text after which the model answers `messages` under a marker.

        The last message is a user's; in a template with bad markers it may also be an answer, after which another one
        to the same question is asked for.
        """
        if not self.markers:
            raise RenderError("no_chat", f"the {self.name} template has no turns; use its text as the prompt")
        if not messages or not self._may_follow(messages[-1].role, Role.ASSISTANT):
            raise RenderError("roles", f"a prompt must end with a user message{' or an answer' * self._runs}")
        if quality == Quality.BAD and not self._runs:
            raise RenderError("no_bad_marker", f"the {self.name} template cannot ask for a bad answer")
        return "".join([span.text for span in self.spans(messages, special)]) + self._marker(quality, wording)

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
        bos = special.bos or ""
        begins = [self.begin] if self.begin_if is None else [self.begin, self.begin_if[1]]
        head = next((bos + begin for begin in begins if text.startswith(bos + begin)), None)
        if head is None or not text.endswith(special.eos) or len(text) == len(head):
            raise ValueError(f"not a complete rendering of the {self.name} template: {text[:80]!r}")
        messages: list[Message] = []
        for number, turn in enumerate(text.removeprefix(head).removesuffix(special.eos).split(special.eos)):
            readings = list(self._readings(turn, first=number == 0))
            if len(readings) != 1:
                raise ValueError(f"{len(readings)} ways to read the {self.name} template in {turn[:80]!r}")
            messages += readings[0]
        if "".join(span.text for span in self.spans(messages, special)) != text:
            raise ValueError(f"not a rendering of the {self.name} template: {text[:80]!r}")
        return tuple(messages)

    def jinja(self, *, mark_answers: bool = False) -> str:
        """Return the Hugging Face chat template of the same format, on one line.

        A message's `quality` and `wording` choose its marker; those given to `apply_chat_template(...,
        add_generation_prompt=True, quality="bad", wording=0)` choose the marker of the answer to come. With
        `mark_answers` the trained spans stand in transformers' `generation` blocks (for its assistant mask); readers
        other than transformers may not know that tag.
        """
        if not self.markers:
            return "{{ bos_token }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
        settings = "".join([f"{{% set {f.name} = {_literal(getattr(self, f.name))} %}}" for f in fields(self)])
        answer = "{{ gap + message['content'] + eos_token }}"
        if mark_answers:
            trained = f"{{% generation %}}{answer}{{% endgeneration %}}"
            answer = f"{{% if message['weight'] == 0 %}}{answer}{{% else %}}{trained}{{% endif %}}"
        return settings + _JINJA.replace("\n", "").replace("ANSWER", answer)

    @property
    def _runs(self) -> bool:
        return bool(self.markers) and self.markers[0][1] is not None

    def _marker(self, quality: Quality, wording: int) -> str:
        if wording >= max(len(self.markers), 1):
            raise RenderError("wording", f"the {self.name} template has no wording {wording} of its markers")
        good, bad = self.markers[wording] if self.markers else ("", None)
        return good if bad is None or quality == Quality.GOOD else bad

    def _may_follow(self, before: Role | None, role: Role) -> bool:
        """Return whether a message of `role` may come after one of the role `before` (None: at the start)."""
        if not self.markers:
            return before is None and role == Role.ASSISTANT
        if role == Role.ASSISTANT:
            return before == Role.USER or (before == Role.ASSISTANT and self._runs)
        if role == Role.USER:
            return before is None or before == Role.SYSTEM or (before == Role.ASSISTANT and not self.single_turn)
        return before is None and self.system is not None

    def _check(self, messages: Sequence[Message], special: SpecialTokens) -> None:
        before = None
        for message in messages:
            if not self._may_follow(before, message.role):
                order = "one user message and its answer" if self.single_turn else "user and assistant in turns"
                wanted = order if self.markers else "one assistant message"
                roles = [m.role.value for m in messages[:12]] + ["..."] * (len(messages) > 12)
                raise RenderError("roles", f"the {self.name} template takes {wanted}, got {', '.join(roles)}")
            before = message.role
        find = _pattern(special).search
        for message in messages:
            if message.role == Role.ASSISTANT:
                if not message.content:
                    raise RenderError("empty_answer", "an assistant message is empty")
                if message.weight and message.quality == Quality.BAD and not self._runs:
                    raise RenderError("no_bad_marker", f"the {self.name} template cannot mark a bad answer as bad")
            if found := find(message.content):
                raise RenderError("special_token", f"a message contains the special token {found[0]!r}")

    def _readings(self, turn: str, *, first: bool) -> Iterator[tuple[Message, ...]]:
        """Yield every way to read what stands between two terminators."""
        if not self.markers:
            yield (Message(Role.ASSISTANT, turn),)
            return
        marked = [
            (marker + self.gap, quality if self._runs else None, wording)
            for wording, pair in enumerate(self.markers)
            for quality, marker in zip((Quality.GOOD, Quality.BAD), pair, strict=True)
            if marker is not None
        ]
        for marker, quality, wording in marked:
            if self._runs and turn.startswith(marker):
                yield (Message(Role.ASSISTANT, turn.removeprefix(marker), quality, wording=wording),)
        for before, body in self._user_starts(turn, first=first):
            for marker, quality, wording in marked:
                for at in _occurrences(body, self.user_suffix + marker):
                    answer = body[at + len(self.user_suffix + marker) :]
                    user = Message(Role.USER, body[:at])
                    yield (*before, user, Message(Role.ASSISTANT, answer, quality, wording=wording))

    def _user_starts(self, turn: str, *, first: bool) -> Iterator[tuple[tuple[Message, ...], str]]:
        """Yield (the system message if there is one, what follows the user's prefix)."""
        if self.system is None or not first:
            if turn.startswith(self.user_prefix):
                yield (), turn.removeprefix(self.user_prefix)
            return
        start = self.system_suffix + self.user_prefix
        for at in _occurrences(turn, start):
            system = () if turn[:at] == self.system else (Message(Role.SYSTEM, turn[:at]),)
            yield system, turn[at + len(start) :]


@lru_cache(maxsize=16)
def _pattern(special: SpecialTokens) -> re.Pattern[str]:
    tokens = sorted(special.reserved | {special.eos}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, tokens)))


def _occurrences(text: str, part: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def _literal(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _phrases(nouns: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return Chain of Hindsight's auxiliary phrases as (good, bad), in the order of its lists."""
    openings = ("The following is a", "Generate a")
    return tuple(
        (f"{o} {good} {noun}.", f"{o} {bad} {noun}.") for o in openings for noun in nouns for good, bad in pairs
    )


# What `spans`, `prompt` and `_check` do, over the fields of a template; used without the line ends.
_JINJA = """
{% set runs = markers[0][1] is not none %}
{% macro marker(bad, wording) %}
{% if bad and not runs %}{{ raise_exception(name + ': no marker for a bad answer') }}{% endif %}
{% if wording < 0 or wording >= markers|length %}{{ raise_exception(name + ': no such wording') }}{% endif %}
{{ markers[wording][1 if bad else 0] }}
{% endmacro %}
{% set state = namespace(before='') %}
{{ (bos_token or '') + (begin_if[1] if begin_if and messages and begin_if[0] in messages[0]['content'] else begin) }}
{% if system is not none and (not messages or messages[0]['role'] != 'system') %}{{ system + system_suffix }}{% endif %}
{% for message in messages %}
{% set role = message['role'] %}
{% if not (role == 'user' and (state.before in ['', 'system'] or state.before == 'assistant' and not single_turn)
 or role == 'assistant' and (state.before == 'user' or state.before == 'assistant' and runs)
 or role == 'system' and loop.first and system is not none) %}
{{ raise_exception(name + ': user and assistant must take turns, the user first') }}{% endif %}
{% if eos_token in message['content'] or (bos_token and bos_token in message['content']) %}
{{ raise_exception('a message must not contain ' + (bos_token or '') + ' or ' + eos_token) }}{% endif %}
{% if role == 'user' %}{{ user_prefix + message['content'] + user_suffix }}
{% elif role == 'system' %}{{ message['content'] + system_suffix }}
{% else %}{{ marker(message['quality'] == 'bad' and (runs or message['weight'] != 0), message['wording'] or 0) }}ANSWER
{% endif %}
{% set state.before = role %}
{% endfor %}
{% if add_generation_prompt %}
{% if not (state.before == 'user' or state.before == 'assistant' and runs) %}
{{ raise_exception(name + ': a prompt must end with a user message') }}{% endif %}
{{ marker(quality == 'bad', wording or 0) }}
{% endif %}
"""

KOALA = Template(
    name="koala",
    begin="BEGINNING OF CONVERSATION: ",
    user_prefix="USER: ",
    user_suffix=" ",
    markers=(("GPT:", "An Unhelpful Answer:"),),
    gap=" ",
)
"""Koala (young-geng/koala_data_pipeline, create_hf_data_v2.py; EasyLM docs/koala.md), `_` standing for a space:

    BEGINNING_OF_CONVERSATION:_USER:_{question}_GPT:_{answer}</s>USER:_...
    BEGINNING_OF_CONVERSATION:_USER:_{question}_An_Unhelpful_Answer:_{answer}</s>

Its runs of answers (`...Answer:_{bad}</s>GPT:_{good}</s>`) are commented out in that file, and nothing uses the lists
of auxiliary phrases in it: there is one wording.
"""

_HH = (("better", "worse"), ("more helpful", "less helpful"), ("more harmless", "more harmful"))
_FACTS = (("better", "worse"), ("more accurate", "less accurate"), ("more correct", "less correct"))
_PHRASES = (*_phrases(("response", "chat"), _HH), *_phrases(("answer",), _FACTS), *_phrases(("summary",), _FACTS))
COH = Template(
    name="coh",
    user_prefix="User: ",
    user_suffix=" ",
    markers=(("A helpful answer:", "An unhelpful answer:"), *_PHRASES),
    gap=" ",
)
COH_WORDINGS = {"dialogue": range(1, 13), "answer": range(13, 19), "summary": range(19, 25)}
"""Chain of Hindsight (lhao499/chain-of-hindsight, coh/data/pack_hf.py and dataset.py), `_` standing for a space:

    User:_{question}_An_unhelpful_answer:_{bad}</s>A_helpful_answer:_{good}</s>

Wording 0 is the default of its flags, the others are its auxiliary phrases. It trained without BOS (but served with it,
coh_serve_llama.py) and wrote a second terminator after the last one; here BOS comes once, and one terminator.
"""

ALPACA_INPUT = "\n\n### Input:\n"  # what joins an instruction and its input in a user's message
_TASK = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
ALPACA = Template(
    name="alpaca",
    begin=_TASK.format(""),
    begin_if=(ALPACA_INPUT, _TASK.format(", paired with an input that provides further context")),
    user_prefix="### Instruction:\n",
    user_suffix="\n\n",
    markers=(("### Response:", None),),
    single_turn=True,
)
r"""Alpaca (tatsu-lab/stanford_alpaca, train.py; its README shows a line end after the last colon, the code has none):

    {begin}### Instruction:\n{instruction}[\n\n### Input:\n{input}]\n\n### Response:{output}</s>
"""

VICUNA = Template(
    name="vicuna",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system_suffix=" ",
    user_prefix="USER: ",
    user_suffix=" ",
    markers=(("ASSISTANT:", None),),
    gap=" ",
)
"""Vicuna (FastChat, fastchat/conversation.py, "vicuna_v1.1"): `{system} USER: {q} ASSISTANT: {a}</s>USER: ...`"""

PLAIN = Template(name="plain")
"""A document between BOS and EOS, every token trained: pretraining text."""

TEMPLATES = {template.name: template for template in (KOALA, COH, ALPACA, VICUNA, PLAIN)}


def get_template(name: str) -> Template:
    """Return the template called `name`; a UserError lists the known ones."""
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}; known templates are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
