"""What a reader makes of a row: conversations, or the reason why there is none."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from easylm_like.data.conversation import Conversation


@dataclass(frozen=True, slots=True)
class Reject:
    """Something that went in and does not come out.

    `where` is file:line (or file[index]) for a row of an input, the id for a conversation that a later step took out;
    `reason` is the word it is counted under, `detail` the sentence, `raw` what was rejected, as it was found.
    """

    source: str
    where: str
    reason: str
    detail: str
    raw: object = None


Record = Conversation | Reject


class Unusable(Exception):
    """What is being converted cannot become a conversation; the caller makes a Reject of it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object of an input file; the ids of its conversations begin with `id`."""

    source: str
    where: str
    id: str
    fields: Mapping[str, object]

    def reject(self, fault: Unusable, raw: object, part: str = "") -> Reject:
        """Return the Reject for `part` of this row."""
        return Reject(self.source, f"{self.where} {part}".strip(), fault.reason, str(fault), raw)


def object_of(value: object, what: str) -> Mapping[str, object]:
    """Return `value` if it is a JSON object; Unusable names it as `what`."""
    if not isinstance(value, dict):
        raise Unusable("malformed", f"{what} must be an object, got {short(value)}")
    return value


def list_of(value: object, what: str) -> list[object]:
    """Return `value` if it is a JSON array; Unusable names it as `what`."""
    if not isinstance(value, list):
        raise Unusable("malformed", f"{what} must be a list, got {short(value)}")
    return value


def text_of(value: object, what: str) -> str:
    """Return the string `value` without outer whitespace; Unusable if it is empty then, or no text at all."""
    if not (text := text_or_empty(value, what)):
        raise Unusable("empty", f"{what} is empty")
    return text


def text_or_empty(value: object, what: str) -> str:
    """Return the string `value` without outer whitespace, which may leave nothing."""
    if not isinstance(value, str):
        raise Unusable("malformed", f"{what} must be a string, got {short(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("broken_unicode", f"{what} holds half of a surrogate pair") from error
    return value.strip()


def short(value: object) -> str:
    """Return `value` as JSON that fits into a sentence."""
    text = "nothing" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
