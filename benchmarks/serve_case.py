"""What the contestants of benchmarks/serve.py share: the case, and how each is told over its pipe when to compute."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train_case import process_mib
from easylm_like.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
ERRORS = 4000  # characters of what a failed contestant said
PAUSE = 0.3  # seconds between turns: threads that wait for work spin for a while


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model for every contestant: a folder, or with `preset` random weights of that shape and `tokenizer`.

    `slots` is the largest batch. `context` 0 is what the engine takes by itself; `layers` 0 are all of a preset's.
    """

    model: str
    slots: int
    context: int = 0
    threads: int = 1
    dtype: str = "auto"
    int8: bool = False
    preset: str = ""
    layers: int = 0
    tokenizer: str = ""
    gguf: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Answers to some prompts at once.

    `first` are the seconds until all of them had a token, `whole` those until the end, `rate` the tokens a second in
    between, 0 where there was only one.
    """

    ids: list[list[int]]
    first: float
    whole: float
    rate: float


Task = Callable[..., object]


def load_case() -> Case:
    """Return the case of the command line."""
    return Case(**json.loads(sys.argv[1]))


def answer(start: Callable[[], tuple[dict[str, object], Mapping[str, Task]]]) -> None:
    """Say what `start` says of itself, then do one task after the other as they come, until nobody asks any more.

    A task is a line of JSON, {"do": its name, ...: its arguments}; its result is another one. In between this process
    waits in a read, so that whoever else is measured has the machine to itself.
    """
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    info, tasks = start()
    known = {**tasks, "peak_mib": lambda: process_mib("VmHWM")}
    said.write(json.dumps(info) + "\n")
    said.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        result = known[asked.pop("do")](**asked)
        said.write(json.dumps(result) + "\n")
        said.flush()


def decoded(ids: list[list[int]], first: float, whole: float, after: int) -> dict[str, object]:
    """Return the fields of a Turn in which `after` tokens came after `first`."""
    return {"ids": ids, "first": first, "whole": whole, "rate": after / (whole - first) if after else 0.0}


class Contestant:
    """A process that answers tasks, each a line of JSON, and sleeps in between."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self._begun = name, time.perf_counter()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as the process
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
        self.info = self._hear()
        self.ready = time.perf_counter() - self._begun  # seconds, with the interpreter's and the imports'

    def ask(self, task: str, **arguments: object) -> Any:
        """Have it do a task; returns the result. A contestant that fails ends the benchmark."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": task, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._hear()

    def decode(self, prompts: list[list[int]], new: int) -> Turn:
        """Have it answer prompts together."""
        return Turn(**self.ask("decode", prompts=prompts, new=new))

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _hear(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self._errors.seek(0)
        sys.exit(f"{self.name} failed with {self.process.returncode}:\n{self._errors.read()[-ERRORS:]}")


@dataclass(slots=True)
class Prompts:
    """Draws prompts that all differ from their beginning on: windows of a text, or random ids."""

    vocab: int
    text: np.ndarray | None
    random: np.random.Generator

    def draw(self, count: int, length: int) -> list[list[int]]:
        """Return `count` prompts of `length` tokens."""
        if self.text is None:
            return self.random.integers(3, self.vocab, (count, length)).tolist()
        starts = self.random.choice(len(self.text) - length, count, replace=False)
        return [self.text[start : start + length].tolist() for start in starts]


def prompts_of(flags: argparse.Namespace, vocab: int) -> Prompts:
    """Return where prompts come from."""
    text = None
    if flags.text:
        tokenizer = load_tokenizer(flags.tokenizer or flags.model)
        text = tokenizer.encode([Path(flags.text).read_text("utf-8")])[0][0]
    return Prompts(vocab, text, np.random.default_rng(0))


def threads() -> int:
    """Return how many threads a contestant computes with: XLA takes as many as there are CPUs for this process."""
    return len(os.sched_getaffinity(0))
