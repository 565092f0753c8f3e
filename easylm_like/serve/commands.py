"""The commands of a chat in a terminal: lines that begin with a slash."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from easylm_like.data.conversation import Conversation, Message, Quality, Role, conversation_to_json
from easylm_like.errors import UserError
from easylm_like.serve.chat import markers
from easylm_like.serve.dialogue import Chat, Settings, Turn, ask, read_line, tell

NUMBERS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "max_tokens": int,
}


def _help(state: Chat, _: str) -> None:
    for name, (what, _command) in COMMANDS.items():
        tell(state, f"{name:<9} {what}")
    tell(state, "A \\ at the end of a line goes on in the next one; a message that begins with / is written //.")


def _new(state: Chat, _: str) -> None:
    state.turns.clear()
    tell(state, "a new chat")


def _system(state: Chat, text: str) -> None:
    state.settings = replace(state.settings, system=text)
    tell(state, "the system message is set" if text else "no system message")


def _good(state: Chat, _: str) -> None:
    _mark(state, Quality.GOOD)


def _bad(state: Chat, _: str) -> None:
    _mark(state, Quality.BAD)


def _both(state: Chat, _: str) -> None:
    _mark(state, Quality.BAD, Quality.GOOD)


def _mark(state: Chat, *qualities: Quality) -> None:
    for quality in qualities:
        if quality not in markers(state.engine):
            raise UserError(f"this model was not trained with a marker for {quality} answers")
    state.settings = replace(state.settings, asked=qualities)
    tell(state, f"answers are {' and '.join(qualities)} ones from now on")


def _last(state: Chat) -> Turn:
    if not state.turns:
        raise UserError("nothing has been asked yet")
    return state.turns[-1]


def _again(state: Chat, _: str) -> None:
    _ask_instead(state, _last(state).question)


def _edit(state: Chat, text: str) -> None:
    last = _last(state).question
    if not text and state.interactive:
        text = read_line("edit> ", last) or ""
    if not text:
        raise UserError(f"/edit needs the new text of the last message, which is {last!r}")
    _ask_instead(state, text)


def _ask_instead(state: Chat, question: str) -> None:
    last, kept = state.turns.pop(), len(state.turns)
    try:
        ask(state, question)
    finally:
        if len(state.turns) == kept:  # the engine has not taken it
            state.turns.append(last)


def _undo(state: Chat, _: str) -> None:
    _last(state)
    tell(state, f"taken back: {state.turns.pop().question}")


def _set(state: Chat, text: str) -> None:
    settings = state.settings
    for assignment in text.split():
        settings = _changed(settings, *assignment.split("=", 1))
    settings.sampling.check()
    state.settings = settings
    now = [f"{name}={getattr(settings.sampling, name)}" for name in NUMBERS if name not in ("seed", "max_tokens")]
    seed = "" if settings.seed is None else settings.seed
    tell(state, " ".join([*now, f"seed={seed}", f"max_tokens={settings.max_tokens}"]))


def _changed(settings: Settings, name: str, text: str | None = None) -> Settings:
    if name not in NUMBERS or text is None:
        raise UserError(f"/set takes NAME=NUMBER, such as temperature=0.7; the names are {', '.join(NUMBERS)}")
    if name == "seed" and not text:
        return replace(settings, seed=None)
    try:
        number = NUMBERS[name](text)
    except ValueError as error:
        kind = "a whole number" if NUMBERS[name] is int else "a number"
        raise UserError(f"{name} must be {kind}, got {text!r}") from error
    changed: dict[str, Any] = {name: number}
    if name in ("seed", "max_tokens"):
        least = 1 if name == "max_tokens" else 0
        if number < least:
            raise UserError(f"{name} must be {least} or more, got {text}")
        return replace(settings, **changed)
    return replace(settings, sampling=replace(settings.sampling, **changed))


def _save(state: Chat, text: str) -> None:
    """Append the chat to a file of conversations; an answer that did not end by itself must not be learnt."""
    if not text:
        raise UserError("/save needs a file, such as /save chats.jsonl; the chat is added at its end")
    system = state.settings.system
    messages = [Message(Role.SYSTEM, system)] if system else []
    for turn in state.turns:
        answers = [answer for answer in turn.answers if answer.text]
        messages += [Message(Role.USER, turn.question)] if answers else []
        messages += [Message(Role.ASSISTANT, a.text, a.quality, weight=int(a.whole)) for a in answers]
    if not any(message.role == Role.ASSISTANT for message in messages):
        raise UserError("there is no answer to save yet")
    record = conversation_to_json(Conversation(time.strftime("chat-%Y%m%dT%H%M%S"), "chat", tuple(messages)))
    try:
        with Path(text).expanduser().open("a", encoding="utf-8") as out:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {text}: {error.strerror}") from error
    tell(state, f"added to {text}")


Command = Callable[[Chat, str], None]
COMMANDS: dict[str, tuple[str, Command]] = {
    "/help": ("this list", _help),
    "/new": ("a new chat", _new),
    "/again": ("answer the last message once more", _again),
    "/edit": ("change the last message; /edit TEXT replaces it", _edit),
    "/undo": ("take the last message and its answer back", _undo),
    "/system": ("/system TEXT sets the system message, /system removes it", _system),
    "/good": ("ask for good answers", _good),
    "/bad": ("ask for bad answers, of a model that was trained with both markers", _bad),
    "/both": ("ask for a bad and a good answer; the chat goes on from the good one", _both),
    "/set": ("/set temperature=0.7 top_p=0.9 seed=1 ...; /set shows the values", _set),
    "/save": ("/save FILE.jsonl adds the chat to a file of conversations", _save),
    "/quit": ("end; so does Ctrl-D", _new),
}
