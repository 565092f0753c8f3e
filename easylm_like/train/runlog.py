"""What a run tells: lines on the terminal and in WORKDIR/train.log, numbers in WORKDIR/metrics.jsonl."""

import json
import time
from pathlib import Path

from easylm_like.atomic import atomic_file


class RunLog:
    """Writes on one host only; `resume_at` forgets metrics of steps that will be run again."""

    def __init__(self, workdir: Path, *, active: bool, resume_at: int) -> None:
        self._active = active
        self._lines, self._metrics = workdir / "train.log", workdir / "metrics.jsonl"
        if active and self._metrics.exists():
            lines = self._metrics.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill may have left half a line at the end
            kept = [line for line in whole if json.loads(line)["step"] <= resume_at]
            with atomic_file(self._metrics) as path:
                path.write_text("".join(kept))

    def line(self, text: str) -> None:
        """Show one line and keep it."""
        if self._active:
            print(text, flush=True)
            with self._lines.open("a") as out:
                out.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")

    def metrics(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Append {"step", "kind": "train" | "heldout", ...values}; `step` counts the updates made."""
        if self._active:
            with self._metrics.open("a") as out:
                out.write(json.dumps({"step": step, "kind": kind} | values) + "\n")


class Rate:
    """Tokens per second and time left, measured since the last question."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def ask(self, tokens: float, steps: int, steps_left: int) -> tuple[float, str]:
        """Return (tokens/s, time left as m:ss or h:mm:ss) after `steps` steps with `tokens` tokens."""
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        return tokens / seconds, clock(seconds / max(steps, 1) * steps_left)

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not spent on steps."""
        self._since += seconds


def clock(seconds: float) -> str:
    """Return m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
