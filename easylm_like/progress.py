"""How far a long command is: one line that renews itself on a terminal, plain lines with times in a log."""

import sys
import time
from typing import TextIO

EVERY_SECONDS = (0.5, 30.0)  # on a terminal; in the log and where there is no terminal


class Progress:
    """Counts bytes of the input against `total`; what is printed goes to standard error. `unit` is what records are."""

    def __init__(
        self, total: int, log: TextIO | None, screen: TextIO | None = None, *, unit: str = "conversations"
    ) -> None:
        self.total, self.log, self.screen, self.unit = total, log, screen or sys.stderr, unit
        self.started = self.shown = self.logged = time.monotonic()
        self.bytes = self.records = 0

    def advance(self, size: int, records: int) -> None:
        """Count a part of the input that is done."""
        self.bytes += size
        self.records += records
        now = time.monotonic()
        if self.screen.isatty() and now - self.shown > EVERY_SECONDS[0]:
            self.shown = now
            print(f"\r\033[K{self.text(now)}", end="", file=self.screen, flush=True)
        if now - self.logged > EVERY_SECONDS[1]:
            self.logged = now
            self._line(self.text(now), only_log=self.screen.isatty())

    def stage(self, sentence: str) -> None:
        """Say what comes now."""
        if self.screen.isatty():
            print("\r\033[K", end="", file=self.screen, flush=True)
        self._line(sentence, only_log=time.monotonic() - self.started < EVERY_SECONDS[1])

    def text(self, now: float) -> str:
        """Return how much is done, how fast it goes and how long it will still take."""
        seconds = max(now - self.started, 1e-6)
        text = f"{self.records:,} {self.unit}, {self.records / seconds:,.0f} a second"
        if self.total and self.bytes:
            share = min(self.bytes / self.total, 1.0)
            text += f", {share:.0%} of the input, {_duration(seconds * (1 - share) / share)} left"
        return text

    def _line(self, text: str, only_log: bool = False) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
        if self.log is not None:
            print(line, file=self.log, flush=True)
        if not only_log:
            print(line, file=self.screen, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )
