"""Decoding: tokens a second, time to the first token and memory of this engine and its peers in turns, same weights.

    python -m benchmarks.serve --model=DIR [--batch=1,8] [--new=128] [--rounds=5] [--text=FILE] [--peers=...]
    python -m benchmarks.serve --model=DIR --streams=1,8,32           # through the HTTP server and openai's client
    python -m benchmarks.serve --model=DIR --int8 --text=FILE         # 8 bits against fp32: speed and perplexity
    python -m benchmarks.serve --preset=llama31_8b --tokenizer=DIR --batch=1,64    # random weights, on what JAX finds

DIR is a Hugging Face folder. The peers, in fp32 and greedy as we are, on --threads (default: as many as XLA takes):

    transformers  generate, eager torch, without an end-of-answer id: every answer is full
    llama.cpp     the server of xllamacpp on an F32 GGUF file, by its own timings; for orientation

Every contestant is a process that stays, is warmed up with the sizes to come, and sleeps while another one computes.
The order is drawn anew for each round, and so are the prompts, so that nothing is found in a cache: windows of --text,
or random ids. The rate counts what comes after every answer has its first token, "with prompts" everything. Greedy ids
must be those of transformers: where a row differs, the benchmark ends with an error unless transformers' own two logits
are nearer than 1e-3 there. "compiled later" are programs that the engine compiled after its warm-up, and must be 0.

--streams measures the server with --slots slots (default: as many as streams), and how many CPUs it and its clients
took: where both together take all there are, more streams cannot be faster. --int8 scores windows of the text, too. The
GPU case has not been run yet; --preset=tiny runs anywhere. Asserts no times.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve_case import ERRORS, PAUSE, ROOT, Case, Contestant, Prompts, Turn, prompts_of, threads
from benchmarks.serve_streams import measure_streams

PEERS = ("transformers", "llama.cpp")
FIRST = 256  # tokens of the prompt whose first token is timed
WINDOW = 512  # tokens that are scored together
TIE = 1e-3  # logits nearer than this may change places by rounding


def main() -> None:
    """Read the flags, measure what they ask for, print the tables."""
    flags = _flags()
    with ExitStack() as stack:
        if flags.streams:
            measure_streams(flags, stack)
        else:
            measure_decoding(flags, stack)


def measure_decoding(flags: argparse.Namespace, stack: ExitStack) -> None:
    """Measure contestants in this process tree, in turns."""
    contestants = dict(start_contestants(flags, stack))
    best = next(iter(contestants.values()))
    prompts = prompts_of(flags, best.info["vocab"])
    what = f"{flags.preset} (random weights)" if flags.preset else Path(flags.model).name
    print(
        f"{what}, {best.info['weights']:,} weights, context {best.info['context']}, {best.info['device']}, "
        f"{threads()} CPUs, peers on {flags.threads} threads; "
        f"prompts of {flags.prompt} tokens, {flags.new} new ones, {flags.rounds} rounds",
        flush=True,
    )
    for contestant in contestants.values():
        for batch in flags.batch:
            contestant.decode(prompts.draw(batch, flags.prompt), 4)
        contestant.decode(prompts.draw(1, flags.first), 1)
    medians = {}
    for batch in flags.batch:
        turns, asked = race(contestants, prompts, (batch, flags.prompt, flags.new), flags.rounds)
        show_rates(f"batch {batch}", turns, batch, flags.new)
        medians[batch] = statistics.median(turn.rate for turn in turns[best.name])
        if "transformers" in contestants:
            compare_ids(contestants, turns, asked)
    print("".join(f"\n{best.name}: batch {b} is {medians[b] / medians[1]:.2f} of batch 1" for b in medians if b > 1))
    turns, _ = race(contestants, prompts, (1, flags.first, 1), flags.rounds)
    show_first(turns, flags.first)
    show_processes(contestants)
    if flags.int8:
        show_perplexity(contestants, prompts.text, flags.scored)


def start_contestants(flags: argparse.Namespace, stack: ExitStack) -> Iterator[tuple[str, Contestant]]:
    """Yield who takes part, ours first; each has loaded its model."""
    dtype = "float32" if flags.model else "auto"
    case = Case(
        model=str(Path(flags.model).resolve()),
        slots=max(flags.batch),
        context=flags.context,
        threads=flags.threads,
        dtype=dtype,
        preset=flags.preset,
        layers=flags.layers,
        tokenizer=str(Path(flags.tokenizer).resolve()),
    )
    cases = {"int8": replace(case, int8=True), "float32": case} if flags.int8 else {"ours": case}
    room = max(flags.first + 1, flags.prompt + flags.new) + 8
    if flags.model and not flags.int8:
        cases |= {peer: replace(case, context=room) for peer in filter(None, flags.peers.split(","))}
    for name, its in cases.items():
        if name == "llama.cpp":
            its = replace(its, gguf=str(_gguf(flags, stack)))
        module = (
            ["serve_peers", json.dumps(asdict(its)), name] if name in PEERS else ["serve_ours", json.dumps(asdict(its))]
        )
        contestant = Contestant(name, [sys.executable, "-m", f"benchmarks.{module[0]}", *module[1:]])
        stack.callback(contestant.close)
        yield name, contestant


def race(
    contestants: dict[str, Contestant], prompts: Prompts, sizes: tuple[int, int, int], rounds: int
) -> tuple[dict[str, list[Turn]], list[list[list[int]]]]:
    """Let all answer the same fresh prompts, in a fresh order each round; `sizes` are batch, prompt and answer."""
    batch, length, new = sizes
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    asked = [prompts.draw(batch, length) for _ in range(rounds)]
    for number, one in enumerate(asked):
        for name in random.Random(number).sample(list(contestants), len(contestants)):
            time.sleep(PAUSE)
            turns[name].append(contestants[name].decode(one, new))
    return turns, asked


def show_rates(title: str, turns: dict[str, list[Turn]], batch: int, new: int) -> None:
    """Print tokens a second of every contestant and what ours are of each other's."""
    print(f"\n{title:14} {'best':>9} {'median':>9} {'ms/step':>8} {'with prompts':>12}  rounds, tokens/s")
    rates = {name: [turn.rate for turn in some] for name, some in turns.items()}
    whole = {name: [batch * new / turn.whole for turn in some] for name, some in turns.items()}
    for name, some in rates.items():
        middle = statistics.median(some)
        print(
            f"{name:14} {max(some):9,.0f} {middle:9,.0f} {1000 * batch / middle:8.2f} "
            f"{statistics.median(whole[name]):12,.0f}  {', '.join(f'{rate:,.0f}' for rate in some)}"
        )
    ours, *others = rates
    for other in others:
        print(
            f"{ours} / {other}: {_ratio(rates[ours], rates[other])}; with prompts {_ratio(whole[ours], whole[other])}"
        )
    sys.stdout.flush()


def show_first(turns: dict[str, list[Turn]], length: int) -> None:
    """Print how long the first token takes after a prompt is there."""
    print(f"\nfirst token of {length}, ms: ", end="")
    times = {name: [1000 * turn.first for turn in some] for name, some in turns.items()}
    print("; ".join(f"{n} {min(some):.1f} best, {statistics.median(some):.1f} median" for n, some in times.items()))
    ours, *others = times
    for other in others:
        print(f"{ours} / {other}, time: {_ratio(times[ours], times[other], best=min)}")


def compare_ids(contestants: dict[str, Contestant], turns: dict[str, list[Turn]], asked: list[list[list[int]]]) -> None:
    """Print how many answers are transformers'; exit with an error where ours differs by more than rounding."""
    wanted = [row for turn in turns["transformers"] for row in turn.ids]
    prompts = [row for one in asked for row in one]
    for name in turns:
        if name == "transformers":
            continue
        found, gaps = [row for turn in turns[name] for row in turn.ids], []
        for prompt, ours, theirs in zip(prompts, found, wanted, strict=True):
            if len(ours) != len(theirs):
                sys.exit(f"{name}: {len(ours)} tokens instead of {len(theirs)}")
            place = next((n for n, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
            if place is not None:
                pair = {"one": theirs[place], "other": ours[place]}
                gaps.append(contestants["transformers"].ask("gap", ids=[*prompt, *theirs[:place]], **pair))
        near = f"; the others part at logits that differ by at most {max(gaps):.1e}" if gaps else ""
        print(f"greedy ids: {len(found) - len(gaps)} of {len(found)} answers of {name} are transformers'{near}")
        if name == "ours" and any(not gap <= TIE for gap in gaps):
            sys.exit(f"that is more than {TIE}: it does not compute the same")


def show_processes(contestants: dict[str, Contestant]) -> None:
    """Print what every contestant took to be ready, its memory, and what ours compiled too late."""
    print(
        f"\n{'':14} {'ready after':>11} {'load':>6} {'warm-up':>8} {'peak MiB':>9} {'device MiB':>11}  compiled later"
    )
    for name, contestant in contestants.items():
        info, ours = contestant.info, name not in PEERS
        device = contestant.ask("device_mib") if ours else None
        print(
            f"{name:14} {contestant.ready:10.1f}s {info['load']:5.1f}s {info['warm']:7.1f}s "
            f"{contestant.ask('peak_mib'):9,.0f} {'' if device is None else f'{device:,.0f}':>11}  "
            f"{contestant.ask('compilations') if ours else ''}"
        )


def show_perplexity(contestants: dict[str, Contestant], text: np.ndarray | None, most: int) -> None:
    """Print nats a token of the text, in windows, in fp32 and in 8 bits."""
    assert text is not None
    length = min(WINDOW, contestants["int8"].info["context"])
    windows = [text[at : at + length].tolist() for at in range(0, min(most, len(text)) - length + 1, length)]
    if not windows:
        sys.exit(f"--text has {len(text)} tokens, at least {length} are needed")
    scores = {name: np.concatenate(one.ask("score", texts=windows)) for name, one in contestants.items()}
    nats = {name: -float(one.mean()) for name, one in scores.items()}
    difference = scores["float32"] - scores["int8"]
    error = difference.std() / len(difference) ** 0.5
    print(
        f"\n{len(difference):,} tokens in windows of {length}: {nats['float32']:.5f} nats a token in fp32, "
        f"{nats['int8']:.5f} in int8 ({difference.mean():+.5f}, standard error {error:.5f}); "
        f"perplexity {np.exp(nats['float32']):.4f} and {np.exp(nats['int8']):.4f}, "
        f"ratio {np.exp(difference.mean()):.5f}"
    )


def _gguf(flags: argparse.Namespace, stack: ExitStack) -> Path:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "gguf"
    model = Path(flags.model).resolve()
    command = [sys.executable, "-m", "easylm_like.convert", "to-gguf", f"--model={model}", f"--out={folder}"]
    if (model / "tokenizer.model").is_file():  # that of tokenizer.json may be one that the format cannot hold
        command.append(f"--tokenizer={model / 'tokenizer.model'}")
    done = subprocess.run([*command, "--type=F32"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"no GGUF file could be made for llama.cpp; leave it out of --peers\n{done.stderr[-ERRORS:]}")
    return next(folder.glob("*.gguf"))


def _ratio(ours: list[float], theirs: list[float], best: Any = max) -> str:
    rounds = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    middle = statistics.median(rounds)
    return f"{best(ours) / best(theirs):.2f} of the best, {middle:.2f} median ({rounds[0]:.2f} to {rounds[-1]:.2f})"


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser.add_argument("--model", default="", help="a Hugging Face folder")
    parser.add_argument("--batch", type=numbers, default=[1, 8], help="answers at once, ascending")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--first", type=int, default=FIRST, help="tokens of the prompt whose first token is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=0, help="of our engine; 0: what it takes by itself")
    parser.add_argument("--text", default="", help="a file that prompts are cut from; default: random ids")
    parser.add_argument("--peers", default=",".join(PEERS), help="any of them; may be empty")
    parser.add_argument("--threads", type=int, default=threads(), help="of the peers")
    parser.add_argument("--streams", type=numbers, default=[], help="measure the server with so many streams at once")
    parser.add_argument("--slots", type=int, default=0, help="of the server; 0: the most streams")
    parser.add_argument("--int8", action="store_true", help="compare 8 bits with fp32; needs --text")
    parser.add_argument("--scored", type=int, default=20_000, help="tokens of the text that are scored at most")
    parser.add_argument("--preset", default="", help="of easylm_like/model/presets.py, instead of --model")
    parser.add_argument("--layers", type=int, default=0, help="of the preset; 0: all")
    parser.add_argument("--tokenizer", default="", help="a folder, for --preset")
    flags = parser.parse_args()
    if bool(flags.model) == bool(flags.preset) or bool(flags.preset) != bool(flags.tokenizer):
        parser.error("give --model, or --preset with --tokenizer")
    if (flags.int8 and not flags.text) or (flags.streams and not flags.model):
        parser.error("--int8 needs --text, --streams needs --model")
    if unknown := set(filter(None, flags.peers.split(","))) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))} is none of {', '.join(PEERS)}")
    return flags


if __name__ == "__main__":
    main()
