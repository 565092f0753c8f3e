"""Training steps: tokens a second, memory and losses of this trainer and its peers in turns, same model, same tokens.

    python -m benchmarks.train --model=15m --batch=8 --length=256 [--dtype=bfloat16] [--peers=torch,easylm,tunix]
    python -m benchmarks.train --model=1b --batch=4 --length=4096 --dtype=bfloat16 --remat=attention       # one H200
    python -m benchmarks.train --model=8b --batch=2 --length=4096 --dtype=bfloat16 --param_dtype=bfloat16 --remat=inputs

A step is everything between a batch of ids and new weights: forward, loss, backward, clipping to 1, AdamW at a constant
rate, and for us the metrics. Each run is a fresh process that waits for every step; the order alternates from round to
round. The 15M and 110M models begin with the same weights in all contestants, so their losses must agree step by step:
they are printed side by side, and a difference beyond rounding ends the benchmark with an error. The peers:

    torch    HF transformers' LlamaForCausalLM, eager on a CPU, compiled on a GPU
    easylm   --easylm=DIR, a checkout of young-geng/EasyLM, with --easylm_python=PYTHON that has its requirements
    tunix    --tunix=DIR, a checkout of google/tunix (or installed), with --tunix_python=PYTHON

A peer that is not there is left out with a word. "first step" has the compilation in it. Memory is the process's
greatest resident set, also less what it had after its imports, and on a GPU the device's peak. The GPU cases have not
been run yet; the 8B one needs XLA_PYTHON_CLIENT_MEM_FRACTION=0.95. Asserts no times.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.train_case import Case
from easylm_like.model.config import LlamaConfig
from easylm_like.model.presets import get_preset


def _small(d_model: int, d_ff: int, layers: int, heads: int) -> LlamaConfig:
    """Return the shape of one of karpathy/llama2.c's story models."""
    return LlamaConfig(
        vocab_size=32000,
        d_model=d_model,
        d_ff=d_ff,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=d_model // heads,
        tie_embeddings=True,
    )


MODELS = {
    "tiny": get_preset("tiny"),  # to see that everything runs; its times mean nothing
    "15m": _small(288, 768, 6, 6),
    "110m": _small(768, 2048, 12, 12),
    "1b": get_preset("llama32_1b"),
    "8b": get_preset("llama31_8b"),
}
SAME_START = ("tiny", "15m", "110m")  # small enough to hand the weights over in a file
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of a loss, in nats
ROOT = Path(__file__).resolve().parents[1]
Measured = dict[str, Any]  # what train_case.run prints


def main() -> None:
    """Read the flags, run all contestants in turns, print the tables."""
    flags = _flags()
    shape = dataclasses.replace(MODELS[flags.model], max_length=max(MODELS[flags.model].max_length, flags.length))
    if flags.untie:
        shape = dataclasses.replace(shape, tie_embeddings=False)
    with tempfile.TemporaryDirectory() as folder:
        case = Case(
            shape=shape,
            batch=flags.batch,
            length=flags.length,
            steps=flags.steps,
            dtype=flags.dtype,
            learning_rate=flags.learning_rate,
            folder=Path(folder),
            given_weights=flags.model in SAME_START,
            options={name: str(value) for name, value in vars(flags).items()},
        )
        path = case.save()
        contestants = commands(flags, path)
        if case.given_weights:
            _child([*contestants["ours"], "weights"])
        name = f"{flags.model}{' untied' if flags.untie else ''}"
        print(
            f"{name}, {flags.batch} x {flags.length}, {flags.dtype}, {os.cpu_count()} CPUs: {_switches(flags)}",
            flush=True,
        )
        results = race(contestants, flags.rounds)
    tokens = flags.batch * flags.length
    print_speed(results, tokens, flags.warmup)
    if case.given_weights:
        compare_losses(results, TOLERANCE[flags.dtype], tied=shape.tie_embeddings)


def commands(flags: argparse.Namespace, case: Path) -> dict[str, list[str]]:
    """Return the command of each contestant, ours first."""
    pythons = {"torch": sys.executable, "easylm": flags.easylm_python, "tunix": flags.tunix_python}
    found = {"ours": [sys.executable, "-m", "benchmarks.train_ours", str(case)]}
    for peer in filter(None, flags.peers.split(",")):
        if peer not in pythons:
            sys.exit(f"--peers: {peer!r} is none of {', '.join(pythons)}")
        found[peer] = [pythons[peer], "-m", "benchmarks.train_peers", str(case), peer]
    return found


def race(contestants: dict[str, list[str]], rounds: int) -> dict[str, list[Measured]]:
    """Run all in turns, every other round backwards; who says that it cannot take part is not asked again."""
    results: dict[str, list[Measured]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(results)[:: 1 if number % 2 == 0 else -1]:
            measured = _child(contestants[name])
            if reason := measured.get("skipped"):
                print(f"{name}: left out, {reason}", flush=True)
                del results[name]
            else:
                results[name].append(measured)
    return results


def print_speed(results: dict[str, list[Measured]], tokens: int, warmup: int) -> None:
    """Print tokens a second of the median step after the warm-up, by round, memory, and our ratios to each peer."""
    rates = {
        name: [tokens / statistics.median(run["seconds"][warmup:]) for run in runs] for name, runs in results.items()
    }
    print(f"{'':8} {'tokens/s':>9}  {'first step':>10}  {'peak MiB':>9}  {'less imports':>12}  {'device MiB':>10}")
    for name, runs in results.items():
        on_device = runs[0]["device_mib"]
        print(
            f"{name:8} {max(rates[name]):9,.0f}  {min(run['seconds'][0] for run in runs):9.1f}s  {_peak(runs):9,.0f}  "
            f"{_own_peak(runs):12,.0f}  {'' if on_device is None else f'{on_device:10,.0f}'}"
            f"  rounds {', '.join(f'{rate:,.0f}' for rate in rates[name])}"
        )
    for peer in list(results)[1:]:
        ratios = sorted(a / b for a, b in zip(rates["ours"], rates[peer], strict=True))
        print(
            f"ours / {peer}: tokens/s {max(rates['ours']) / max(rates[peer]):.2f} of the best rounds, "
            f"{statistics.median(ratios):.2f} median ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
            f"memory {_peak(results['ours']) / _peak(results[peer]):.2f}, "
            f"less imports {_own_peak(results['ours']) / _own_peak(results[peer]):.2f}{_on_device(results, peer)}"
        )


def compare_losses(results: dict[str, list[Measured]], tolerance: float, *, tied: bool) -> None:
    """Print the losses of the steps side by side; exit with an error if a peer's are not ours."""
    losses = {name: runs[0]["losses"] for name, runs in results.items()}
    print(f"{'loss':>8}  " + "  ".join(f"{name:>9}" for name in losses))
    for number, row in enumerate(zip(*losses.values(), strict=True), start=1):
        print(f"{number:8}  " + "  ".join(f"{value:9.5f}" for value in row))
    for peer in list(losses)[1:]:
        comparable = 1 if peer == "easylm" and tied else None  # EasyLM never ties, so it is another model after a step
        pairs = list(zip(losses["ours"], losses[peer], strict=True))[:comparable]
        difference = max(abs(a - b) for a, b in pairs)
        print(f"{peer}: losses of {len(pairs)} steps differ from ours by at most {difference:.1e}")
        if not difference <= tolerance:
            sys.exit(f"that is more than {tolerance}: it does not compute the same")


def _on_device(results: dict[str, list[Measured]], peer: str) -> str:
    ours, theirs = results["ours"][0]["device_mib"], results[peer][0]["device_mib"]
    return f", on the device {ours / theirs:.2f}" if ours and theirs else ""


def _peak(runs: Sequence[Measured]) -> float:
    return min(run["peak_mib"] for run in runs)


def _own_peak(runs: Sequence[Measured]) -> float:
    return min(run["peak_mib"] - run["imported_mib"] for run in runs)


def _child(command: list[str]) -> Measured:
    """Run a contestant; return the last line that it prints. A peer whose interpreter lacks something is skipped."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return {"skipped": f"there is no {command[0]}"}
    last = done.stderr.strip().splitlines()[-1:]
    if done.returncode and "benchmarks.train_peers" in command and "".join(last).startswith("ModuleNotFoundError"):
        return {"skipped": f"{command[0]}: {last[-1]}"}
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-4000:]}")
    lines = done.stdout.splitlines()
    return dict(json.loads(lines[-1])) if lines else {}


def _switches(flags: argparse.Namespace) -> str:
    names = ("attention", "remat", "scan", "param_dtype", "moment_dtype", "micro_batches", "optimizer")
    return ", ".join(f"{name} {getattr(flags, name)}" for name in names)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="15m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of matmuls and activations")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--untie", action="store_true", help="give the model a head of its own, as EasyLM always does")
    parser.add_argument("--peers", default="torch", help="any of torch,easylm,tunix; may be empty")
    parser.add_argument("--easylm", default="", help="folder of an EasyLM checkout")
    parser.add_argument("--easylm_python", default=sys.executable)
    parser.add_argument("--tunix", default="", help="folder of a Tunix checkout")
    parser.add_argument("--tunix_python", default=sys.executable)
    parser.add_argument(
        "--torch_compile", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU"
    )
    ours = parser.add_argument_group("this trainer's switches (torch follows param_dtype, and remat other than all)")
    ours.add_argument("--attention", default="auto")
    ours.add_argument("--remat", default="all")
    ours.add_argument("--scan", action="store_true", help="scan the layers; else they are unrolled")
    ours.add_argument("--param_dtype", choices=TOLERANCE, default="float32")
    ours.add_argument("--moment_dtype", choices=TOLERANCE, default="float32")
    ours.add_argument("--micro_batches", type=int, default=1)
    ours.add_argument("--optimizer", default="adamw")
    flags = parser.parse_args()
    if not 0 <= flags.warmup < flags.steps:
        parser.error(f"--warmup {flags.warmup} must be less than --steps {flags.steps}")
    return flags


if __name__ == "__main__":
    main()
