"""Conversions: time and greatest memory of ours, of a plain copy, of transformers and of EasyLM, in turns.

    python -m benchmarks.convert --model=llama2_7b [--layers=4] [--rounds=3] [--cases=to-hf,to-orbax,from-orbax,to-gguf]
    python -m benchmarks.convert --model=llama_7b --layers=4 --cases=to-hf,to-orbax,easylm-in,from-easylm
        --easylm=DIR --easylm_python=PYTHON

The model is a preset with random weights (norms around 1, the rest around 0), written to the disk a tensor at a time in
--dtype and shards of --shard_gb; with --work=DIR it stays there for the next call. The cases:

    to-hf         a Hugging Face folder into one; against `copy` (shutil.copyfile of all its files) and `transformers`
                  (from_pretrained in the stored dtype, save_pretrained)
    to-orbax      the folder into a checkpoint; against EasyLM's convert_hf_to_easylm.py, if --easylm is given
    from-orbax    that checkpoint into a folder
    to-gguf       the folder into Q8_0
    from-easylm   EasyLM's stream into a folder; against EasyLM's convert_easylm_to_hf.py; after to-orbax

Every run is a process of its own, in turns, every other round backwards. Its time is from its start to the moment when
this process has flushed what it wrote to the disk, so that nobody gains by leaving that to the system; what ours spent
on its proof is shown apart ("less proof"). Before each run its input is dropped from the page cache, or read into it
with --cache=warm. Memory is ru_maxrss of the process from wait4: file-mapped pages count, the page cache does not.

EasyLM needs --easylm=DIR, a checkout of young-geng/EasyLM, and --easylm_python=PYTHON with jax, flax, "transformers<5",
torch, mlxu, einops and safetensors. A peer that would not fit into the memory is left out with a word. Up to three
copies of the model lie on the disk. Asserts no times.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.convert_model import DTYPES, write_model
from easylm_like.hf.card import count_parameters
from easylm_like.model.config import LlamaConfig
from easylm_like.model.presets import get_preset

ROOT = Path(__file__).resolve().parents[1]
CASES = ("to-hf", "to-orbax", "from-orbax", "to-gguf", "from-easylm")
NEEDS = {"transformers": 1.3, "easylm": 4.0}  # times the bytes of the model in bfloat16; transformers' in any dtype
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """One conversion: seconds with flushing, those of ours that were proof, greatest memory and bytes written."""

    seconds: float
    proof: float
    write: float
    peak: int
    written: int

    @property
    def unproven(self) -> float:
        """Seconds without the proof."""
        return self.seconds - self.proof


@dataclass(frozen=True, slots=True)
class Case:
    """Commands that make the same of the same `source`, ours first; OUT stands for the folder to make."""

    name: str
    source: Path
    commands: dict[str, list[str]]
    keep: dict[str, Path] = dataclasses.field(default_factory=dict)  # whose result is the source of a later case


def main() -> None:
    """Read the flags, write the model, run every case in turns, print the tables."""
    flags = _flags()
    shape = get_preset(flags.model)
    shape = dataclasses.replace(shape, n_layers=flags.layers or shape.n_layers)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(flags.work or temporary).resolve()
        # In another process: ru_maxrss of every run begins with the greatest memory of the process that starts it.
        arguments = (work / "model", shape, flags.dtype, int(flags.shard_gb * 1e9))
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=arguments)
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit("the model could not be written")
        files = [path.stat().st_size for path in (work / "model").glob("*.safetensors")]
        print(
            f"{flags.model}, {shape.n_layers} layers, {count_parameters(shape):,} weights in {flags.dtype}, "
            f"{sum(files) / 1e9:.2f} GB in {len(files)} files; {os.cpu_count()} CPUs, {flags.cache} page cache\n"
            f"bound of memory, 1.5 times the largest file + 300 MB: {(1.5 * max(files) + 300e6) / MIB:,.0f} MiB",
            flush=True,
        )
        try:
            for case in _cases(flags, shape, work):
                show(case.name, race(case, flags, work / "out"))
        finally:
            for kept in ("out", "start", "easylm"):
                shutil.rmtree(work / kept, ignore_errors=True)


def race(case: Case, flags: argparse.Namespace, out: Path) -> dict[str, list[Run]]:
    """Run the contestants of a case in turns; one that fails is told and not asked again."""
    results: dict[str, list[Run]] = {name: [] for name in case.commands}
    for number in range(flags.rounds):
        for name in list(results)[:: 1 if number % 2 == 0 else -1]:
            shutil.rmtree(out, ignore_errors=True)
            for path in _files(case.source):
                _prepare_cache(path, flags.cache)
            command = [str(out) if word == "OUT" else word.replace("=OUT", f"={out}") for word in case.commands[name]]
            run = _measure(command, out)
            if isinstance(run, str):
                print(f"{case.name}, {name}: {run}", flush=True)
                del results[name]
                continue
            results[name].append(run)
            if name in case.keep:
                shutil.rmtree(case.keep[name], ignore_errors=True)
                out.rename(case.keep[name])
    shutil.rmtree(out, ignore_errors=True)
    return results


def show(name: str, results: dict[str, list[Run]]) -> None:
    """Print the medians of a case, and of what ours is of each other one, round by round."""
    print(f"\n{name:14} {'seconds':>8} {'less proof':>10} {'written in':>10} {'peak MiB':>9} {'GB':>6}  rounds")
    for who, runs in results.items():
        whole, unproven, write = (
            _median(getattr(run, key) for run in runs) for key in ("seconds", "unproven", "write")
        )
        own = f"{unproven:10.1f} {write:10.1f}" if write else " " * 21
        peak, rounds = max(run.peak for run in runs) / MIB, ", ".join(f"{run.seconds:.1f}" for run in runs)
        print(f"{who:14} {whole:8.1f} {own} {peak:9,.0f} {runs[0].written / 1e9:6.2f}  {rounds}")
    for who, runs in results.items():
        if who != "ours" and "ours" in results:
            pairs = list(zip(results["ours"], runs, strict=True))
            print(
                f"ours / {who}: time {_median(a.seconds / b.seconds for a, b in pairs):.2f}, "
                f"less proof {_median(a.unproven / b.seconds for a, b in pairs):.2f}, "
                f"writing alone {_median(a.write / b.seconds for a, b in pairs):.2f}, "
                f"memory {_median(a.peak / b.peak for a, b in pairs):.2f}"
            )
    sys.stdout.flush()


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _cases(flags: argparse.Namespace, shape: LlamaConfig, work: Path) -> Iterator[Case]:
    """Yield the cases that are asked for, when those before them are done."""
    model, start, stream = work / "model", work / "start", work / "easylm"
    ours = [sys.executable, "-m", "easylm_like.convert"]
    to_hf = [*ours, "to-hf", "--out=OUT", f"--shard_gb={flags.shard_gb}"]
    orbax = [*ours, "to-orbax", f"--model={model}", "--out=OUT", "--template=koala"]
    hints = [f"--shape={model / 'config.json'}", f"--tokenizer={model}", "--template=koala"]
    cases = {
        "to-hf": Case("to-hf", model, {"ours": [*to_hf, f"--model={model}"]} | _peers(flags, shape, model)),
        "to-orbax": Case(
            "to-orbax",
            model,
            {"ours": orbax} | _easylm(flags, shape, "easylm_in", model),
            {"ours": start, "easylm": stream},
        ),
        "from-orbax": Case("from-orbax", start, {"ours": [*to_hf, f"--model={start}"]}),
        "to-gguf": Case("to-gguf", model, {"ours": [*ours, "to-gguf", f"--model={model}", "--out=OUT", "--type=Q8_0"]}),
        "from-easylm": Case(
            "from-easylm",
            stream,
            {"ours": [*to_hf, f"--model={stream / 'streaming_params'}", *hints]}
            | _easylm(flags, shape, "easylm_out", stream),
        ),
    }
    for name in flags.cases.split(","):
        if not cases[name].source.is_dir():
            print(f"{name}: left out, it needs what to-orbax leaves", flush=True)
            continue
        yield cases[name]


def _peers(flags: argparse.Namespace, shape: LlamaConfig, model: Path) -> dict[str, list[str]]:
    """Return the commands that stand beside to-hf."""
    command = [sys.executable, "-m", "benchmarks.convert_peers"]
    peers = {name: [*command, name, str(model), "OUT"] for name in ("copy", "transformers")}
    size = count_parameters(shape) * DTYPES[flags.dtype].itemsize
    return {name: command for name, command in peers.items() if _fits(name, size)}


def _easylm(flags: argparse.Namespace, shape: LlamaConfig, peer: str, source: Path) -> dict[str, list[str]]:
    if not flags.easylm or not _fits("easylm", 2 * count_parameters(shape)):
        return {}
    words = [flags.easylm_python, "-m", "benchmarks.convert_peers", peer, str(source), "OUT", flags.easylm]
    return {"easylm": words}


def _fits(name: str, size: int) -> bool:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    free = int(found[1]) * 1024
    needs = NEEDS.get(name, 0) * size
    if needs > free:
        print(f"{name}: left out, it needs about {needs / 1e9:.0f} GB of memory and {free / 1e9:.0f} are free")
    return needs <= free


def _measure(command: list[str], out: Path) -> Run | str:
    """Run a command and flush what it wrote; returns a sentence if it fails."""
    with tempfile.TemporaryFile() as said:
        begun = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for path in _files(out):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        seconds = time.monotonic() - begun
        said.seek(0)
        text = said.read().decode(errors="replace").strip()
    if process.returncode:
        return f"ended with status {process.returncode}: {' '.join(text.splitlines()[-3:])}"
    record = next(iter(out.rglob("conversion.json")), None)
    own = json.loads(record.read_text())["seconds"] if record else {"proof": 0.0, "write": 0.0}
    written = sum(path.stat().st_size for path in _files(out))
    return Run(seconds, own["proof"], own["write"], usage.ru_maxrss * 1024, written)


def _prepare_cache(path: Path, cache: str) -> None:
    with path.open("rb") as file:
        if cache == "cold":
            os.fsync(file.fileno())  # only what is on the disk can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(16 * MIB):
                pass


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2_7b", help="a preset of easylm_like/model/presets.py")
    parser.add_argument("--layers", type=int, default=0, help="of the preset; 0: all")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shard_gb", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default="to-hf,to-orbax,from-orbax,to-gguf", help=", ".join(CASES))
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold")
    parser.add_argument("--work", default="", help="a folder for all files; default: a temporary one")
    parser.add_argument("--easylm", default="", help="a checkout of young-geng/EasyLM")
    parser.add_argument("--easylm_python", default=sys.executable)
    flags = parser.parse_args()
    if unknown := set(flags.cases.split(",")) - set(CASES):
        parser.error(f"--cases: {', '.join(sorted(unknown))} is none of {', '.join(CASES)}")
    return flags


if __name__ == "__main__":
    main()
