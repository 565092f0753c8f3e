"""Build a mixture: read every source, clean and filter, choose, split, shuffle, and write what a training run reads.

OUT/train.jsonl     conversations to train on, shuffled
    heldout.jsonl   conversations that share no prompt and no group with a training conversation
    rejects.jsonl   {"source", "where", "reason", "detail", "raw"} of everything that was left out
    manifest.json   inputs with hashes and licences, counts that add up, seed, config, versions
    build.log       the progress, with times

Two passes: workers make the lines of all conversations (worker.py), which lie in a file until the choices that have to
see all of them are made (decide.py). Memory grows by some 150 bytes a conversation (measured), whatever its length.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from easylm_like.atomic import atomic_folder
from easylm_like.errors import UserError
from easylm_like.progress import Progress
from easylm_like.provenance import versions

from .config import MixtureConfig
from .decide import Chooser, Decision
from .files import hash_file
from .ledger import Ledger
from .manifest import MADE_BY, NAME, Input, digest_of, hash_companions, hash_inputs, is_built
from .record import Reject
from .spool import JUDGED, Spool
from .worker import reject_line, run


def build(config: MixtureConfig, out: Path) -> bool:
    """Write the mixture to `out`, whole or not at all; False if the same build is there already.

    Raises:
        UserError: the config or a file is wrong, two conversations share an id, or nothing is left to train on.
    """
    config.check()
    inputs = hash_inputs(config)
    companions = hash_companions(config)
    digest = digest_of(config, inputs, companions)
    if is_built(out, digest):
        return False
    try:
        with atomic_folder(out, mark=NAME) as folder:
            manifest = _write(config, inputs, folder)
            outputs = {path.name: {"sha256": hash_file(path)} for path in sorted(folder.glob("*.jsonl"))}
            header = {"made_by": MADE_BY, "digest": digest, "outputs": outputs, "companions": companions}
            text = json.dumps(header | manifest, indent=2, ensure_ascii=False)
            (folder / NAME).write_text(text + "\n", "utf-8")
    except OSError as error:
        if error.filename in {i.path for i in inputs} and not isinstance(error, FileExistsError):
            raise  # that one cannot be read; the error names it
        raise UserError(f"cannot write {out}: {error}") from error
    return True


def _write(config: MixtureConfig, inputs: list[Input], folder: Path) -> dict[str, Any]:
    """Write everything but the manifest into `folder` and return what the manifest says of it."""
    ledger = Ledger()
    spool_path, keys_path = folder / "spool", folder / "near_keys"
    with ExitStack() as stack:
        log = stack.enter_context((folder / "build.log").open("w", encoding="utf-8"))
        plain = all(Path(i.path).suffix in (".json", ".jsonl", ".txt") for i in inputs)
        progress = Progress(sum(i.bytes for i in inputs) if plain else 0, log)
        rejects = stack.enter_context((folder / "rejects.jsonl").open("wb"))
        spool = stack.enter_context(Spool(spool_path))
        with keys_path.open("wb") as keys:
            for product in run(config):
                spool.add(product.lines, product.entries)
                rejects.write(product.rejects)
                if product.keys is not None:
                    keys.write(product.keys.tobytes())
                for entry in product.counts:
                    ledger.add(entry)
                progress.advance(product.bytes, len(product.entries))
        for source in config.sources:
            read = {entry.step for entry in ledger.of(source.label) if entry.entered}
            for step, path in (("read path", source.path), ("read heldout_path", source.heldout_path)):
                if path and step not in read:
                    raise UserError(f"source {source.label!r}: {path} holds no rows")
        spool.close_for_reading()
        progress.stage(f"{len(spool.index)} conversations read; choosing")

        def reject(record: Reject) -> None:
            rejects.write(reject_line(record).encode("ascii"))

        chooser = Chooser(spool, config, ledger, reject)
        decision = chooser.decide(keys_path if config.near_duplicates and len(spool.index) else None)
        if not len(decision.train):
            reasons = Counter[str]()
            for booked in ledger.entries.values():
                reasons += booked.rejected
            raise UserError(f"nothing is left to train on; {len(decision.heldout)} held out, rejected: {dict(reasons)}")
        progress.stage(f"writing {len(decision.train)} training and {len(decision.heldout)} held-out conversations")
        _write_lines(folder / "train.jsonl", _with_own_ids(spool, decision.train))
        _write_lines(folder / "heldout.jsonl", spool.lines(decision.heldout))
        progress.stage("done")
        result = _manifest(config, inputs, ledger, spool, decision)
        result["warnings"] = warnings_of(config, result["sources"])
    shutil.rmtree(spool_path)
    keys_path.unlink()
    return result


def _write_lines(path: Path, lines: Iterator[bytes]) -> None:
    with path.open("wb", buffering=1 << 20) as out:
        out.writelines(lines)


def _with_own_ids(spool: Spool, numbers: np.ndarray) -> Iterator[bytes]:
    """Yield the lines; a conversation's second copy, in the order of the file, gets the id ID~2, and so on."""
    copies = np.bincount(numbers, minlength=len(spool.index))
    seen: Counter[int] = Counter()
    for number, line in zip(numbers, spool.lines(numbers), strict=True):
        if copies[number] > 1:
            seen[number] += 1
            if seen[number] > 1:
                record = json.loads(line)
                record["id"] += f"~{seen[number]}"
                line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        yield line


def warnings_of(config: MixtureConfig, counts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what was done as the config says and may still surprise who wrote it."""
    found = []
    for source in config.sources:
        count = counts[source.label]
        left = count["train"] + count["heldout"]
        if not left:
            found.append(f"source {source.label!r} gives nothing; rejected: {count['rejected']}")
        elif source.heldout_fraction and not count["heldout"]:
            found.append(f"source {source.label!r}: of {left} none is held out, wanted {source.heldout_fraction:g}")
    over = {source.label: counts[source.label]["rejected"].get("over_weight", 0) for source in config.sources}
    if any(source.weight for source in config.sources) and sum(over.values()):
        scarce = min(config.sources, key=lambda s: over[s.label] / max(counts[s.label]["train"], 1)).label
        found.append(f"source {scarce!r} sets the size: the weights leave out {sum(over.values())} conversations")
    return found


def _manifest(
    config: MixtureConfig, inputs: list[Input], ledger: Ledger, spool: Spool, decision: Decision
) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "inputs": [asdict(i) for i in inputs],
        "sources": {
            source.label: _balance(number, source.label, ledger, spool, decision)
            for number, source in enumerate(config.sources)
        },
        "steps": [entry.to_json() for entry in ledger.entries.values()],
        "versions": versions(["ml_collections"]),
    }


def _balance(
    number: int, source: str, ledger: Ledger, spool: Spool, decision: Decision
) -> dict[str, int | dict[str, int]]:
    """Return a source's counts: read + made = train + heldout + rejected, train + heldout = good + bad + unjudged."""
    train, heldout = (chosen[spool.index["source"][chosen] == number] for chosen in (decision.train, decision.heldout))
    judged = np.bincount(spool.index["judged"][np.concatenate([train, heldout])], minlength=len(JUDGED))
    entries = ledger.of(source)
    read = sum(entry.entered for entry in entries if entry.step.startswith("read"))
    made = sum(entry.made for entry in entries)
    rejected = Counter[str]()
    for entry in entries:
        rejected += entry.rejected
        assert entry.entered + entry.made == entry.left + entry.rejected.total(), entry
    assert read + made == rejected.total() + len(train) + len(heldout) == rejected.total() + judged.sum(), source
    counts = {name: int(count) for name, count in zip(JUDGED, judged, strict=True)}
    return {
        "read": read,
        "made": made,
        "rejected": dict(rejected),
        **{key: counts[key] for key in ("good", "bad", "unjudged")},
        "train": len(train),
        "heldout": len(heldout),
    }
