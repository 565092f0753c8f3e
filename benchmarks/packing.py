"""Packed rows against padding: trained-on tokens a second on real dialogues, this trainer and a torch loop in turns.

    python -m benchmarks.packing --file=harmless-base_test.jsonl.gz --format=hh --tokenizer=tokenizer.model
    python -m benchmarks.packing --file=sharegpt.json --format=sharegpt --tokenizer=tokenizer.model --row_length=2048

Both train llama2.c's 15M shape on the same random conversations of the file, tokenised and weighted once by this
project, each conversation once. Ours packs them into rows (best fit) and takes --rows of them a step, with the
trainer's own loader and step. The peer is HF transformers' LlamaForCausalLM with AdamW: batches of 8 conversations in
random order, padded to the batch's longest, with an attention mask and the label -100 where the weight is 0. The
learning rate is 0, so that the loss of an epoch depends on neither order nor batches: it must be the same. Times are
those of an epoch, without what the first step takes longer than the median one (compilation). Each run is a fresh
process. Asserts no times.
"""

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train_case import Case, process_mib

ROOT = Path(__file__).resolve().parents[1]
PEER_BATCH = 8
Epoch = Iterator[tuple[float, float, int]]  # by step: seconds, summed loss, tokens that were computed, padding included


def main() -> None:
    """Tokenise, run both in turns, print the tables; or run one of them."""
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(child(Path(sys.argv[3]), {"ours": our_epoch, "padded": padded_epoch}[sys.argv[2]])))
        return
    flags = _flags()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real, trained = tokenise(flags, folder)
        print(
            f"{flags.conversations} conversations of {flags.file.name}: {real:,} tokens, {trained / real:.0%} of them "
            f"trained on, {real / flags.conversations:.0f} each"
        )
        (folder / "flags.json").write_text(json.dumps({"rows": flags.rows, "row_length": flags.row_length}))
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "padded": []}
        for number in range(flags.rounds):
            for who in list(runs)[:: 1 if number % 2 == 0 else -1]:
                command = [sys.executable, "-m", "benchmarks.packing", "child", who, str(folder)]
                done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
                runs[who].append(json.loads(done.stdout.splitlines()[-1]))
    report(runs, real, trained)


def report(runs: dict[str, list[dict[str, float]]], real: int, trained: int) -> None:
    """Print a line each and the ratio; exit with an error if the losses are not the same."""
    print(f"{'':8} {'useful tokens/s':>15} {'real tokens/s':>13} {'computed':>10} {'real share':>10} {'peak MiB':>9}")
    for name, of in runs.items():
        seconds, computed = min(run["seconds"] for run in of), of[0]["computed"]
        print(
            f"{name:8} {trained / seconds:15,.0f} {real / seconds:13,.0f} {computed:10,.0f} {real / computed:10.1%} "
            f"{min(run['peak_mib'] for run in of):9,.0f}  rounds {_list([trained / run['seconds'] for run in of])}"
        )
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(*runs.values(), strict=True))
    best = [min(run["seconds"] for run in of) for of in runs.values()]
    print(
        f"ours / padded: {best[1] / best[0]:.2f} of the best rounds, {statistics.median(ratios):.2f} median "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    losses = [of[0]["loss"] / trained for of in runs.values()]
    print(f"loss of an epoch: ours {losses[0]:.5f}, padded {losses[1]:.5f}")
    if abs(losses[0] - losses[1]) > 1e-3:
        sys.exit("the losses differ: not the same thing was computed")


def _list(rates: list[float]) -> str:
    return ", ".join(f"{rate:,.0f}" for rate in rates)


def child(folder: Path, run: Callable[[Path, np.ndarray], Epoch]) -> dict[str, float]:
    """Run an epoch; return its seconds without compilation, its loss, tokens and memory."""
    order = np.random.default_rng(0).permutation(len(np.load(folder / "tokens" / "offsets.npy")) - 1)
    steps = list(run(folder, order))
    seconds = [step[0] for step in steps]
    seconds[0] = min(seconds[0], statistics.median(seconds))
    return {
        "seconds": sum(seconds),
        "loss": sum(step[1] for step in steps),
        "computed": sum(step[2] for step in steps),
        "peak_mib": process_mib("VmHWM"),
    }


def tokenise(flags: argparse.Namespace, folder: Path) -> tuple[int, int]:
    """Write the data set of random conversations and the model's case; return (token pairs, trained ones)."""
    from data_prep.config import Format
    from data_prep.rows import convert_rows
    from data_prep.sources import READERS
    from easylm_like.data.conversation import Conversation
    from easylm_like.data.dataset import TooLong, read_dataset, write_dataset
    from easylm_like.data.encode import Encoded, encode
    from easylm_like.data.template import get_template
    from easylm_like.data.tokenizer import load_tokenizer

    records = convert_rows(str(flags.file), "bench", READERS[Format(flags.format)].convert)
    conversations = [record for record in records if isinstance(record, Conversation)]
    random.Random(0).shuffle(conversations)
    encoded = encode(conversations, get_template(flags.template), load_tokenizer(flags.tokenizer))
    usable = (item for item in encoded if isinstance(item, Encoded) and item.weights[: flags.row_length + 1].any())
    chosen = [item for item, _ in zip(usable, range(flags.conversations), strict=False)]
    if len(chosen) < flags.conversations:
        sys.exit(f"{flags.file} has {len(chosen)} usable conversations; give --conversations={len(chosen)} or fewer")
    (folder / "tokens").mkdir()
    write_dataset(folder / "tokens", chosen, flags.row_length, TooLong.CUT, str(flags.file))
    write_model(folder, flags.row_length)
    dataset = read_dataset(folder / "tokens", "")
    return int(dataset.lengths().sum()), int(dataset.weights.sum())


def write_model(folder: Path, row_length: int) -> None:
    """Write the case and, in a process of its own, the first weights."""
    from benchmarks.train import MODELS

    case = Case(
        shape=dataclasses.replace(MODELS["15m"], max_length=max(row_length + 1, 2048)),
        batch=PEER_BATCH,
        length=row_length,
        steps=1,
        dtype="float32",
        learning_rate=0.0,
        folder=folder,
        given_weights=True,
        options={"param_dtype": "float32", "moment_dtype": "float32", "remat": "all", "scan": "False"}
        | {"attention": "auto", "micro_batches": "1", "optimizer": "adamw"},
    )
    command = [sys.executable, "-m", "benchmarks.train_ours", str(case.save()), "weights"]
    subprocess.run(command, cwd=ROOT, check=True)


def our_epoch(folder: Path, order: np.ndarray) -> Epoch:
    """Yield the steps over packed rows; the loader shuffles on its own."""
    import jax

    from benchmarks.train_case import load_case
    from benchmarks.train_ours import computed, start
    from easylm_like.data.dataset import read_dataset
    from easylm_like.data.loader import make_loader
    from easylm_like.train.step import to_devices

    flags = json.loads((folder / "flags.json").read_text())
    case = load_case(str(folder / "case.pickle"))
    loader = make_loader(read_dataset(folder / "tokens", ""), flags["row_length"], flags["rows"], 0)
    segments = max(len(row) for row in loader.rows)
    shape = computed(case, max_segments=segments)
    mesh, state, step = start(case, shape)
    # Unshuffled, what is left over of the last batch is filled up with empty rows, not with the next epoch's.
    whole = dataclasses.replace(loader, shuffle=False)
    with jax.set_mesh(mesh):
        for number in range(loader.steps_per_epoch):
            began = time.perf_counter()
            batch = to_devices(mesh, whole.batch(number), whole.batch_size)
            state, metrics = step(state, batch)
            loss = float(metrics["loss"]) * float(metrics["trained_tokens"])
            yield time.perf_counter() - began, loss, batch.tokens.size


def padded_epoch(folder: Path, order: np.ndarray) -> Epoch:
    """Yield the steps over padded batches in random order."""
    import torch

    from benchmarks.train_case import load_case
    from benchmarks.train_peers import torch_model, torch_optimizer

    case = load_case(str(folder / "case.pickle"))
    model, _ = torch_model(case, "cpu")
    optimizer = torch_optimizer(case, model)
    ids, weights, offsets = (np.load(folder / "tokens" / f"{name}.npy") for name in ("ids", "weights", "offsets"))
    for first in range(0, len(order), PEER_BATCH):
        began = time.perf_counter()
        rows = [slice(offsets[record], offsets[record + 1]) for record in order[first : first + PEER_BATCH]]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        tokens = pad([torch.from_numpy(ids[row]).long() for row in rows])
        weight = pad([torch.from_numpy(weights[row]).long() for row in rows])
        mask = pad([torch.ones(row.stop - row.start, dtype=torch.long) for row in rows])
        labels = torch.where(weight > 0, tokens, -100)
        loss: Any = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total = loss.item() * int((labels[:, 1:] >= 0).sum())
        yield time.perf_counter() - began, total, tokens.numel()


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="a native file, or conversations as JSONL")
    parser.add_argument("--format", default="conversations", help="hh, sharegpt, ...: a name of data_prep's formats")
    parser.add_argument("--tokenizer", required=True, help="LLaMA's, or another of at most 32,000 ids")
    parser.add_argument("--template", default="koala")
    parser.add_argument("--conversations", type=int, default=256)
    parser.add_argument("--row_length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2, help="packed rows a step")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
