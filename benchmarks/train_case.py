"""What the contestants of benchmarks/train.py share: the case, its tokens, and how steps and memory are measured.

Needs numpy and the standard library alone, because some contestants run in an interpreter of their own.
"""

import json
import pickle
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from easylm_like.model.config import LlamaConfig

MIB = 2**20
BETA1, BETA2, EPS, CLIP_NORM = 0.9, 0.999, 1e-8, 1.0  # every contestant's AdamW, without weight decay


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison. `folder` holds the first weights under Hugging Face's names if `given_weights`, else nothing.

    `options` are the flags that mean something to one contestant only.
    """

    shape: LlamaConfig
    batch: int
    length: int
    steps: int
    dtype: str
    learning_rate: float
    folder: Path
    given_weights: bool
    options: dict[str, str] = field(default_factory=dict)

    def save(self) -> Path:
        """Write the case into its folder, for the contestants; return the file."""
        path = self.folder / "case.pickle"
        path.write_bytes(pickle.dumps(self))
        return path

    def ids(self, step: int) -> np.ndarray:
        """Return int32 [batch, length]: random tokens, the small ids often, so that there is something to learn."""
        u_BT = np.random.default_rng([0, step]).random((self.batch, self.length))
        return (self.shape.vocab_size * u_BT**4).astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """`step` trains on ids [B, T] and returns the loss of their T - 1 predictions, when all is computed.

    `imported_mib` is the memory before the weights were made; `device_mib` asks for the device's peak.
    """

    step: Callable[[np.ndarray], float]
    imported_mib: float
    device: str = "cpu"
    device_mib: Callable[[], float] | None = None


class SkippedError(Exception):
    """The contestant cannot take part; the text says why."""


def load_case(path: str) -> Case:
    """Return the case of a file that `Case.save` wrote."""
    case = pickle.loads(Path(path).read_bytes())
    assert isinstance(case, Case)
    return case


def run(case: Case, make: Callable[[Case], Contestant]) -> None:
    """Make a contestant, let it take the case's steps, and print what was measured as a line of JSON."""
    try:
        contestant = make(case)
    except SkippedError as reason:
        print(json.dumps({"skipped": str(reason)}))
        return
    seconds, losses = [], []
    for number in range(case.steps):
        ids = case.ids(number)
        began = time.perf_counter()
        losses.append(contestant.step(ids))
        seconds.append(time.perf_counter() - began)
    measured = {
        "seconds": seconds,
        "losses": losses,
        "imported_mib": contestant.imported_mib,
        "peak_mib": process_mib("VmHWM"),
        "device": contestant.device,
        "device_mib": contestant.device_mib() if contestant.device_mib else None,
    }
    print(json.dumps(measured))


def process_mib(what: str = "VmRSS") -> float:
    """Return this process's memory, or with "VmHWM" its greatest so far.

    Not resource.getrusage: its ru_maxrss begins with the memory of the process that started this one.
    """
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / MIB
