"""The chat in a terminal, through a pseudo-terminal as a person has one, and through a pipe as a script has one."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from easylm_like.data.conversation import Quality, Role, read_conversations
from tests.serve.conftest import Reference

PARROT = ("tests.serve.parrot", "koala")
# A session's first process takes the terminal, so that the character of Ctrl-C becomes a signal.
TAKE_TERMINAL = (
    "import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); del sys.argv[0]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
CONTROL_C, CONTROL_D, LEFT, UP = "\x03", "\x04", "\x1b[D", "\x1b[A"


class Terminal:
    """A program on a pseudo-terminal; `seen` is what it has written since the last look."""

    def __init__(self, root: Path, *module: str) -> None:
        self.file, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *module],
            cwd=root,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "INPUTRC": os.devnull},
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Return what is written up to what the pattern finds, and that; escapes of readline are left out."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready = select.select([self.file], [], [], max(0, end - time.monotonic()))[0]
            assert ready, f"no {pattern!r} in {self.seen!r}"
            data = b""
            with suppress(OSError):  # the program has ended
                data = os.read(self.file, 1 << 16)
            assert data, f"ended without {pattern!r} in {self.seen!r}"
            self.seen += re.sub(r"\x1b\[\?2004[hl]\r?", "", data.decode()).replace("\r\n", "\n")
        self.seen, before = self.seen[found.end() :], self.seen[: found.end()]
        return before

    def say(self, line: str) -> str:
        """Type a line and return what comes of it until the next prompt."""
        self.type(line + "\r")
        self.until(re.escape(line) + "\n")
        return self.until(r"(^|\n)> $")


@contextmanager
def on_terminal(root: Path, *module: str) -> Iterator[Terminal]:
    terminal = Terminal(root, *module)
    try:
        terminal.until("> $")
        yield terminal
        assert terminal.process.poll() is None or terminal.process.returncode == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.file)


@pytest.fixture
def terminal(root: Path) -> Iterator[Terminal]:
    with on_terminal(root, *PARROT) as terminal:
        yield terminal


def test_a_chat_of_several_turns(terminal: Terminal) -> None:
    said = terminal.say("Hi")
    assert said.startswith("USER: Hi GPT: \n")
    assert re.search(r"3 tokens(, [\d.]+ tokens/s)?, first after \d\.\d\d s, prompt 40 \(3 cached\), stop", said)
    assert terminal.say("And?").startswith("USER: Hi GPT: USER: Hi GPT: | USER: And? GPT: \n")
    terminal.say("/undo")
    assert terminal.say("So?").startswith("USER: Hi GPT: USER: Hi GPT: | USER: So? GPT: \n")
    assert terminal.say("/again").startswith("USER: Hi GPT: USER: Hi GPT: | USER: So? GPT: \n")
    assert terminal.say("/edit Well?").startswith("USER: Hi GPT: USER: Hi GPT: | USER: Well? GPT: \n")
    terminal.say("/new")
    assert terminal.say("//new is a command").startswith("USER: /new is a command GPT: \n")
    terminal.type(CONTROL_D)
    assert terminal.process.wait(20) == 0


def test_good_and_bad_answers(terminal: Terminal, tmp_path: Path) -> None:
    terminal.say("/bad")
    assert terminal.say("One").startswith("USER: One An Unhelpful Answer: \n")
    terminal.say("/both")
    said = terminal.say("Two")
    bad, good = said.split("[good]")
    assert "[bad]" in bad
    assert "\nUSER: One An Unhelpful Answer: USER: One" in bad  # as it was asked for then
    assert "| USER: Two An Unhelpful Answer: \n" in bad
    assert "| USER: Two GPT: \n" in good
    terminal.say("/good")
    assert "USER: Two GPT: USER: One" in terminal.say("Three")  # it goes on from the good one
    terminal.say("/set max_tokens=1")
    terminal.say("/edit Four")
    assert "added to" in terminal.say(f"/save {tmp_path}/chats.jsonl")
    terminal.say(f"/save {tmp_path}/chats.jsonl")
    saved, again = read_conversations(tmp_path / "chats.jsonl")
    assert saved.messages == again.messages
    assert [(m.role, m.quality, m.weight) for m in saved.messages] == [
        (Role.USER, None, 1),
        (Role.ASSISTANT, Quality.BAD, 1),
        (Role.USER, None, 1),
        (Role.ASSISTANT, Quality.BAD, 1),
        (Role.ASSISTANT, Quality.GOOD, 1),
        (Role.USER, None, 1),
        (Role.ASSISTANT, Quality.GOOD, 0),  # it was cut off
    ]
    assert saved.messages[5].content == "Four"


def test_control_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.type("SLOW\r")
    terminal.until("3 4 5 ")
    terminal.type(CONTROL_C)
    said = terminal.until(r"\n> $")
    assert "stopped" in said
    assert " 500 " not in said
    terminal.type("/both\r")
    terminal.until(r"\n> $")
    terminal.type("SLOW\r")
    terminal.until("3 4 5 ")
    terminal.type(CONTROL_C)
    assert "[good]" not in terminal.until(r"\n> $")  # the second answer is not begun
    terminal.type("half a line")
    terminal.until("half a line$")
    terminal.type(CONTROL_C)
    try:
        terminal.until(r"\n> $", seconds=5)
    except AssertionError:  # seen once in twenty times: Python's readline takes note of a signal at the next key only
        terminal.type(CONTROL_C)
        terminal.until(r"\n> $")
    assert "3 4 5" in terminal.say("Hi")  # what came before it was stopped is part of the chat
    assert "half a line" not in terminal.say("/again")


def test_lines_are_edited(terminal: Terminal) -> None:
    terminal.type("Helo" + LEFT + "l\r")
    assert "USER: Hello GPT: \n" in terminal.until(r"\n> $")
    terminal.type(UP + "!\r")
    assert "| USER: Hello! GPT: \n" in terminal.until(r"\n> $")
    terminal.type("/edit\r")
    terminal.until("edit> Hello!$")
    terminal.type("\x08?\r")
    assert "USER: Hello? GPT: \n" in terminal.until(r"\n> $")
    terminal.type("one\\\r")
    terminal.until(r"\n\. $")
    terminal.type("two\r")
    assert "| USER: one two GPT: \n" in terminal.until(r"\n> $")


def test_a_person_is_told_what_is_wrong_and_goes_on(terminal: Terminal) -> None:
    assert "no command /nonsense" in terminal.say("/nonsense")
    assert "nothing has been asked yet" in terminal.say("/again")
    assert "/set takes NAME=NUMBER" in terminal.say("/set heat=1")
    assert "top_p must be above 0 and at most 1, got 3.0" in terminal.say("/set top_p=3")
    assert "top_k must be a whole number, got '1.5'" in terminal.say("/set top_k=1.5")
    assert "temperature=0.5 top_p=1.0 top_k=7" in terminal.say("/set temperature=0.5 top_k=7 seed=3 max_tokens=9")
    assert terminal.say("SAMPLING").startswith("0.5 7 3 9\n")
    terminal.say("/system Be brief.")
    assert "the koala template takes user and assistant in turns" in terminal.say("Hi")
    assert "taken back: SAMPLING" in terminal.say("/undo")  # the other was refused
    terminal.say("/system")
    terminal.say("Kept")
    assert "a message contains the special token" in terminal.say("/edit </s>")
    assert terminal.say("/again").startswith("USER: Kept GPT: \n")
    assert "the answer broke off: out of memory" in terminal.say("BREAK")
    terminal.say("/new")
    assert "leaves no place for an answer in a context of 400" in terminal.say("long " * 80)
    assert "there is no answer to save yet" in terminal.say("/save x.jsonl")
    assert terminal.say("Hi").startswith("USER: Hi GPT: \n")
    assert "cannot write /nowhere/x.jsonl: No such file" in terminal.say("/save /nowhere/x.jsonl")
    listed = terminal.say("/help")
    for name in "/help /new /again /edit /undo /system /good /bad /both /set /save /quit".split():
        assert f"{name} " in listed
    terminal.type("/quit\r")
    assert terminal.process.wait(20) == 0


def test_an_answer_does_not_command_the_terminal(terminal: Terminal) -> None:
    assert terminal.say("HOSTILE").startswith("\\x1b[31mred\\x1b[0m \\u202e \\x07\n")


Pipe = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def pipe(root: Path) -> Pipe:
    def run(text: str | bytes, template: str = "koala") -> "subprocess.CompletedProcess[bytes]":
        data = text.encode() if isinstance(text, str) else text
        command = [sys.executable, "-m", PARROT[0], template]
        return subprocess.run(command, cwd=root, input=data, capture_output=True, timeout=120, check=False)

    return run


def test_a_pipe_gets_the_answers_and_nothing_else(pipe: Pipe) -> None:
    done = pipe("Hi\r\n\n/set temperature=0\nSAMPLING\n/new\n/bad\nGrüße, 你好\n/help\nHOSTILE")
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().split("\n")
    assert lines[0] == "USER: Hi GPT: "
    assert re.fullmatch(r"0.0 0 \d+ 512", lines[1])
    assert lines[2:] == ["USER: Grüße, 你好 An Unhelpful Answer: ", "\x1b[31mred\x1b[0m \u202e \x07", ""]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Hi\n/nonsense\nNo\n", "error: no command /nonsense; /help lists them"),
        ("BREAK\nNo\n", "error: the answer broke off: out of memory"),
        (b"Hi\n\xff\n", "error: the line '\\udcff' is not UTF-8"),
        ("</s>\n", "error: a message contains the special token '</s>'"),
    ],
)
def test_a_pipe_ends_at_the_first_line_that_cannot_be_answered(pipe: Pipe, text: str | bytes, sentence: str) -> None:
    done = pipe(text)
    assert done.returncode == 1
    assert done.stderr.decode().startswith(sentence)
    assert done.stdout.count(b"\n") <= 1


def test_markers_are_those_of_the_model(pipe: Pipe) -> None:
    assert pipe("/good\nHi\n", "vicuna").returncode == 0
    assert b"not trained with a marker for bad answers" in pipe("/bad\n", "vicuna").stderr
    assert b"this model has no chat template" in pipe("Hi\n", "plain").stderr


def test_the_command_says_what_transformers_says(root: Path, folder: Path, reference: Reference) -> None:
    command = [sys.executable, "-m", "easylm_like.serve", "chat", f"--model={folder}", "--context=128"]
    lines = "/set temperature=0 max_tokens=16\n/both\nTell me a story about a cat.\n"
    done = subprocess.run(command, cwd=root, input=lines, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    talk = [{"role": "user", "content": "Tell me a story about a cat."}]
    texts = [reference.text(reference.chat(talk, quality=quality), 16) for quality in ("bad", "good")]
    assert done.stdout == "".join(text.split("USER:")[0].removeprefix(" ") + "\n" for text in texts)
