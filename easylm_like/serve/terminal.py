r"""A chat in the terminal, in process: `python -m easylm_like.serve chat --model=MODEL`.

On a terminal it streams, edits lines and says how fast it was; Ctrl-C stops an answer, Ctrl-D ends. In a pipe every
line is a message or a command, and nothing but the answers is printed:

    printf '%s\n' '/set temperature=0' 'Name a colour.' 'Another one.' | python -m easylm_like.serve chat --model=DIR
"""

import sys
from collections.abc import Iterator

from easylm_like.errors import UserError
from easylm_like.serve.chat import can_chat
from easylm_like.serve.commands import COMMANDS
from easylm_like.serve.dialogue import Chat, Chats, ask, read_line, tell


def chat(engine: Chats) -> None:
    """Talk until the input ends or says /quit.

    Raises:
        UserError: the model cannot chat; in a pipe also a line that cannot be answered.
    """
    if not can_chat(engine):
        raise UserError("this model has no chat template: name one with --template=, or use POST /v1/completions")
    state = Chat(engine, interactive=sys.stdin.isatty() and sys.stdout.isatty())
    tell(state, f"context {engine.context} tokens; /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
    for line in _lines(state):
        if line.strip() in ("/quit", "/exit"):
            return
        try:
            _take(state, line)
        except (UserError, KeyboardInterrupt) as error:
            if not state.interactive:
                raise
            tell(state, f"error: {error}" if isinstance(error, UserError) else "")


def _take(state: Chat, line: str) -> None:
    """Do what a line says; one that begins with // is a message that begins with /."""
    try:
        line.encode()
    except UnicodeEncodeError as error:  # it holds bytes that were none
        raise UserError(f"the line {line!a} is not UTF-8: write it in UTF-8") from error
    if not line.startswith("/") or line.startswith("//"):
        if message := line.removeprefix("/" if line.startswith("//") else "").strip():
            ask(state, message)
        return
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        raise UserError(f"no command {name}; /help lists them, and a message that begins with / is written //")
    COMMANDS[name][1](state, argument.strip())


def _lines(state: Chat) -> Iterator[str]:
    while state.interactive:
        line = read_line("> ")
        if line is None:
            print()
            return
        yield line
    for data in sys.stdin.buffer:  # and not as text, whose encoding is that of the machine
        yield data.decode("utf-8", "surrogateescape").rstrip("\r\n")
