"""What a chat in a terminal is made of: settings, turns, and how a message is answered under one marker or both."""

import queue
import re
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from easylm_like.data.conversation import Quality
from easylm_like.errors import UserError
from easylm_like.serve.answers import Submits
from easylm_like.serve.chat import Fields, Speaker, chat_prompt
from easylm_like.serve.request import Counts, Finish, Output, Request, Sampling

PATIENCE = 5.0  # seconds within which a cancelled answer must have ended
# Controls and what turns the direction of the text after it: a model must not move the cursor or recolour the screen.
_INVISIBLE = re.compile("(?![\n\t])[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Chats(Speaker, Submits, Protocol):
    """An Engine, as far as it is asked here."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What /set and its like change. `seed` None draws one for every answer; `asked`: the markers to answer under."""

    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))  # as the server's default
    seed: int | None = None
    max_tokens: int = 512
    system: str = ""
    asked: tuple[Quality | None, ...] = (None,)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said; `whole` if it ended by itself."""

    text: str
    quality: Quality | None
    whole: bool


@dataclass(slots=True)
class Turn:
    """A message of the user and its answers, the one that the chat goes on from last."""

    question: str
    answers: list[Answer] = field(default_factory=list)


Outputs = queue.SimpleQueue[Output | None]  # None: Ctrl-C


@dataclass(slots=True)
class Chat:
    """A running chat. `interactive`: with a person at a terminal, whose Ctrl-C comes through `outputs`."""

    engine: Chats
    interactive: bool
    settings: Settings = field(default_factory=Settings)
    turns: list[Turn] = field(default_factory=list)
    outputs: Outputs = field(default_factory=queue.SimpleQueue)
    stopped: bool = False


def tell(state: Chat, sentence: str) -> None:
    """Say something that is no answer: to a person only."""
    if state.interactive:
        print(f"\x1b[2m{visible(sentence)}\x1b[0m", file=sys.stderr, flush=True)


def visible(text: str) -> str:
    r"""Return text with what a screen would obey written out, such as \x1b."""
    return _INVISIBLE.sub(lambda found: ascii(found[0])[1:-1], text)


def read_line(prompt: str, text: str = "") -> str | None:
    r"""Read a line that the user can edit, beginning with `text`; after a \ at its end comes another. None: Ctrl-D."""
    _insert(text)
    try:
        line = input(prompt)
        _insert("")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(". ")
    except EOFError:
        return None
    except KeyboardInterrupt:  # away with this line
        print()
        return ""
    return line


def _insert(text: str) -> None:
    """Have the next line begin with `text`, which the user can change."""
    with suppress(ImportError):  # a Python without readline reads plain lines
        import readline

        readline.set_startup_hook(lambda: readline.insert_text(text))


def ask(state: Chat, question: str) -> None:
    """Answer a message; it stays in the chat if the engine has taken it."""
    turn, seed = Turn(question), state.settings.seed
    seed = secrets.randbits(63) if seed is None else seed
    with _interrupts(state):
        for quality in state.settings.asked:
            request = _request(state, turn, quality, seed)
            if state.stopped:
                break
            if len(state.settings.asked) > 1:
                tell(state, f"[{quality}]")
            _stream(state, request, turn, quality)


def _request(state: Chat, turn: Turn, quality: Quality | None, seed: int) -> Request:
    engine, settings = state.engine, state.settings
    messages: list[Fields] = [{"role": "system", "content": settings.system}] if settings.system else []
    for earlier in state.turns:
        if earlier is not turn and any(answer.text for answer in earlier.answers):
            said = next(answer for answer in reversed(earlier.answers) if answer.text)
            judged = {"quality": str(said.quality)} if said.quality else {}
            messages.append({"role": "user", "content": earlier.question})
            messages.append({"role": "assistant", "content": said.text, **judged})
    messages.append({"role": "user", "content": turn.question})
    prompt = chat_prompt(engine, messages, marker=quality)
    if len(prompt.ids) >= engine.context:
        raise UserError(
            f"the chat has {len(prompt.ids)} tokens and leaves no place for an answer in a context of "
            f"{engine.context}: /new begins another one, /undo takes back the last message"
        )
    return Request(
        prompt=prompt.ids,
        max_tokens=settings.max_tokens,
        sampling=replace(settings.sampling, seed=seed),
        stop=prompt.stop,
        gap=prompt.gap,
    )


def _stream(state: Chat, request: Request, turn: Turn, quality: Quality | None) -> None:
    """Print an answer as it comes, put it into its turn, and say how it went."""
    outputs = state.outputs = queue.SimpleQueue()
    began = time.monotonic()
    ticket = state.engine.submit(request, outputs.put)
    if not turn.answers:
        state.turns.append(turn)
    texts: list[str] = []
    times: list[float] = []
    output = None
    try:
        for output in _until_stopped(state, ticket):
            times += [time.monotonic()] if output.ids else []
            texts.append(output.text)
            sys.stdout.write(visible(output.text) if state.interactive else output.text)
            sys.stdout.flush()
    finally:
        finish = output.finish if output else None
        if finish is None:
            state.engine.cancel(ticket)
        turn.answers.append(Answer("".join(texts), quality, finish == Finish.STOP))
    print(flush=True)
    if output and times:
        how = "stopped" if state.stopped else str(finish)
        tell(state, f"{_speed(output.counts, times[0] - began, times[-1] - times[0])}, {how}")
    if output and finish in (Finish.ERROR, Finish.TIMEOUT):
        raise UserError(f"the answer broke off: {output.error or finish}")


def _until_stopped(state: Chat, ticket: int) -> Iterator[Output]:
    """Yield an answer's outputs; Ctrl-C cancels it, and then what has been written meanwhile is all that comes."""
    if state.stopped:  # after the last look, before there was an answer to stop
        state.outputs.put(None)
    with suppress(queue.Empty):
        while True:
            output = state.outputs.get(timeout=PATIENCE if state.stopped else None)
            if output is None:
                state.engine.cancel(ticket)
                continue
            yield output
            if output.finish is not None:
                return


@contextmanager
def _interrupts(state: Chat) -> Iterator[None]:
    """Have Ctrl-C stop the answer while the block runs, without an exception in the middle of a line."""
    state.stopped = False
    if not state.interactive:
        yield
        return

    def stop(*_: object) -> None:
        state.stopped = True
        state.outputs.put(None)  # made to be called in a signal's handler

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _speed(counts: Counts, until_first: float, rest: float) -> str:
    rate = f", {(counts.answer - 1) / rest:.1f} tokens/s" if counts.answer > 1 and rest > 0 else ""
    cached = f" ({counts.cached} cached)" if counts.cached else ""
    tokens = f"{counts.answer} token{'s' * (counts.answer != 1)}"
    return f"{tokens}{rate}, first after {until_first:.2f} s, prompt {counts.prompt}{cached}"
