"""How far a long command is: seldom enough for a log, renewed on a terminal, and never wrong about what is left."""

import io
import re

import pytest

import easylm_like.progress
from easylm_like.progress import Progress

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)")


class Screen(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list whose only item is the time that it is."""
    now = [1000.0]
    monkeypatch.setattr(easylm_like.progress.time, "monotonic", lambda: now[0])
    return now


def sentences(stream: io.StringIO) -> list[str]:
    found = [LINE.fullmatch(line) for line in stream.getvalue().splitlines()]
    assert all(found), stream.getvalue()
    return [line[1] for line in found if line]


def test_a_short_command_says_nothing_where_there_is_no_terminal(clock: list[float]) -> None:
    log, screen = io.StringIO(), io.StringIO()
    progress = Progress(100, log, screen)
    for _ in range(10):
        clock[0] += 2.9
        progress.advance(10, 5)
    progress.stage("choosing")
    assert screen.getvalue() == ""
    assert sentences(log) == ["choosing"]


def test_a_long_one_says_every_half_minute_how_far_it_is(clock: list[float]) -> None:
    log, screen = io.StringIO(), io.StringIO()
    progress = Progress(1000, log, screen)
    for _ in range(20):
        clock[0] += 4
        progress.advance(10, 8)
    progress.stage("choosing")
    # After 32 s 80 of 1000 bytes are read: the other 920 take 368 s more. Then again 32 s later.
    wanted = [
        "64 conversations, 2 a second, 8% of the input, 6 min 8 s left",
        "128 conversations, 2 a second, 16% of the input, 5 min 36 s left",
        "choosing",
    ]
    assert sentences(log) == sentences(screen) == wanted


def test_a_terminal_shows_one_line_that_renews_itself(clock: list[float]) -> None:
    log, screen = io.StringIO(), Screen()
    progress = Progress(1000, log, screen)
    for _ in range(10):
        clock[0] += 0.3
        progress.advance(1, 1)
    shown = screen.getvalue().split("\r\033[K")
    assert shown[0] == ""
    assert [text.split(",")[0] for text in shown[1:]] == [f"{n} conversations" for n in (2, 4, 6, 8, 10)]
    assert "\n" not in screen.getvalue()
    clock[0] += 40
    progress.advance(1, 1)
    assert len(sentences(log)) == 1
    assert "\n" not in screen.getvalue()  # the log's line is not written across the one that renews itself
    progress.stage("choosing")
    *_, last = screen.getvalue().split("\r\033[K")
    assert last.endswith("choosing\n")


def test_what_is_left_is_not_said_where_nobody_knows(clock: list[float]) -> None:
    clock[0] += 10
    progress = Progress(0, io.StringIO(), io.StringIO())
    progress.advance(10, 2000)
    assert progress.text(clock[0] + 10) == "2,000 conversations, 200 a second"
    assert Progress(100, io.StringIO()).text(clock[0]) == "0 conversations, 0 a second"
    progress = Progress(100, io.StringIO())
    progress.advance(110, 1)  # a file grew
    assert progress.text(clock[0] + 2).endswith("100% of the input, 0 s left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (1e5, "27 h 46 min")],
)
def test_durations(clock: list[float], seconds: float, text: str) -> None:
    progress = Progress(200, io.StringIO())
    progress.advance(100, 1)
    assert progress.text(clock[0] + seconds).endswith(f"50% of the input, {text} left")
