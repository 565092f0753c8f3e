"""What a run tells: lines on the terminal and in WORKDIR/train.log, numbers in WORKDIR/metrics.jsonl and elsewhere."""

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from easylm_like.atomic import atomic_file
from easylm_like.train.track import Tracker, names


class RunLog:
    """Writes on one host only; `resume_at` forgets what was written of steps that will be run again, -1 forgets all.

    Used with `with`, which closes the trackers and tells them whether the run failed.
    """

    def __init__(self, workdir: Path, *, active: bool, resume_at: int) -> None:
        self._active, self.folder = active, workdir
        self._lines, self._metrics, self._samples = (
            workdir / name for name in ("train.log", "metrics.jsonl", "samples.jsonl")
        )
        self._trackers: list[Tracker] = []
        for numbers in (self._metrics, self._samples):
            if active and numbers.exists():
                _forget(numbers, resume_at)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl that are kept."""
        if not self._metrics.exists():
            return []
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]

    def track(self, trackers: Sequence[Tracker]) -> None:
        """Send all metrics from now on to these too."""
        self._trackers += trackers

    def sample(self, step: int, values: Mapping[str, str]) -> None:
        """Append {"step", ...values} to samples.jsonl."""
        if self._active:
            with self._samples.open("a") as out:
                out.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")

    def line(self, text: str) -> None:
        """Show one line and keep it."""
        if self._active:
            print(text, flush=True)
            with self._lines.open("a") as out:
                out.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")

    def metrics(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Append {"step", "kind": "train" | "heldout", "time", ...values}; `step` counts the updates made."""
        if self._active:
            when = round(time.time(), 3)
            line = {"step": step, "kind": kind, "time": when, **values}
            with self._metrics.open("a") as out:
                out.write(json.dumps(line) + "\n")
            for tracker in self._trackers:
                tracker.scalars(step, when, names(line))


def _forget(numbers: Path, after: int) -> None:
    """Leave the lines of later steps out of a JSONL file."""
    lines = numbers.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a kill may have left half a line at the end
    with atomic_file(numbers) as path:
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= after))


class Stopwatch:
    """Seconds since the last question."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last call, above 0."""
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        return seconds

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not spent on steps."""
        self._since += seconds


def memory() -> dict[str, float]:
    """Return device_memory_gib, the most that a device of this host ever held, or host_memory_gib of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        return {"device_memory_gib": max(peaks) / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {"host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def step_line(step: int, steps: int, values: Mapping[str, float], left: float) -> str:
    """Return one line about the steps since the last one; `values` are those of metrics.jsonl, `left` is in seconds."""
    flops = values["tflops_per_device"]
    if "mfu" in values:
        work = f"MFU {values['mfu']:.1%} (PaLM {values['mfu_palm']:.1%})"
    else:
        work = f"{flops:.1f} TFLOP/s" if flops >= 1 else f"{1000 * flops:.1f} GFLOP/s"
    kind = "device" if "device_memory_gib" in values else "host"
    skipped = f"  {values['skipped_steps']:.0f} steps skipped" if values.get("skipped_steps") else ""
    return (
        f"step {step:6}/{steps}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
        f"grad {values['grad_norm']:.2f}  {values['tokens_per_second']:,.0f} tokens/s "
        f"({values['trained_tokens_per_second']:,.0f} trained)  {work}  "
        f"{kind} {values[f'{kind}_memory_gib']:.1f} GiB  data {values['data_share']:.1%}  {clock(left)} left{skipped}"
    )


def clock(seconds: float) -> str:
    """Return m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
