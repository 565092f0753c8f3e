"""A tokenised data set on disk: what the trainer reads, with the proof that no token was lost on the way.

FOLDER/ids.npy      int32 [total]      every record's ids, one after the other (memory-mapped when read)
       weights.npy  uint8 [total]      1 = trained
       bad.npy      bool  [total]      the token belongs to an answer marked bad
       offsets.npy  int64 [records+1]  where each record begins
       records.jsonl                   {"id", "source"} of each record, in order
       rejects.jsonl                   {"id", "source", "reason", "detail", "tokens"} of what was left out or cut
       summary.json                    counts that add up: tokens = trained + masked + dropped by reason
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np

from easylm_like.atomic import atomic_folder
from easylm_like.data.conversation import Conversation, read_conversations
from easylm_like.data.encode import Encoded, Rejected, encode
from easylm_like.data.template import Template
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError

FORMAT = 1  # raise when the meaning of the files changes


class TooLong(StrEnum):
    """What happens to a conversation that does not fit a row: its end is cut (never with a false EOS), or it goes."""

    CUT = "cut"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class TokenDataset:
    """The arrays of the folder; `sources` and `record_ids` have one entry a record."""

    ids: np.ndarray
    weights: np.ndarray
    bad: np.ndarray
    offsets: np.ndarray
    record_ids: list[str]
    sources: list[str]
    summary: dict[str, object]
    digest: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """Return int64 [records]: how many (input, target) pairs each record makes, one less than its ids."""
        return np.diff(self.offsets) - 1


@dataclass(slots=True)
class _Tally:
    conversations: int = 0
    tokens: int = 0
    trained: int = 0
    masked: int = 0
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    dropped_conversations: Counter[str] = field(default_factory=Counter)


def load_or_tokenize(
    path: str, template: Template, tokenizer: Tokenizer, *, row_length: int, too_long: TooLong, cache: Path
) -> TokenDataset:
    """Return the data set of a conversation file, from `cache`/<digest> if the same file was tokenised the same way.

    Raises:
        UserError: the file is missing or malformed, or nothing in it can be trained on.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; python -m data_prep build writes conversation files")
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        digest.update(hashlib.file_digest(content, "sha256").digest())
    digest.update(json.dumps([FORMAT, str(template), tokenizer.digest, row_length, too_long]).encode())
    folder = cache / digest.hexdigest()[:16]
    if not (folder / "summary.json").is_file():
        with atomic_folder(folder, mark="records.jsonl") as partial:
            write_dataset(partial, encode(read_conversations(path), template, tokenizer), row_length, too_long, path)
    return read_dataset(folder, digest.hexdigest())


def write_dataset(
    folder: Path, encoded: Iterable[Encoded | Rejected], row_length: int, too_long: TooLong, where: str
) -> None:
    """Write the files of a data set; `where` names the conversations in errors."""
    tally = _Tally()
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    with (folder / "records.jsonl").open("w") as records, (folder / "rejects.jsonl").open("w") as rejects:
        for item in encoded:
            tally.conversations += 1
            for conversation, reason, detail, lost in _losses(item, row_length, too_long):
                row = {"id": conversation.id, "source": conversation.source, "reason": reason, "detail": detail}
                rejects.write(json.dumps(row | {"tokens": lost}) + "\n")
                tally.dropped_tokens[reason] += lost
                tally.dropped_conversations[reason] += 1
            if isinstance(item, Encoded):
                tally.tokens += len(item.ids)
                size = _kept_length(item, row_length, too_long)
                if size:
                    kept.append((item.ids[:size], item.weights[:size], item.bad()[:size]))
                    tally.trained += int(item.weights[:size].sum())
                    tally.masked += int((item.weights[:size] == 0).sum())
                    row = {"id": item.conversation.id, "source": item.conversation.source}
                    records.write(json.dumps(row) + "\n")
    if not kept:
        raise UserError(
            f"{where}: none of its {tally.conversations} conversations can be trained on: "
            f"{dict(tally.dropped_conversations)}"
        )
    assert tally.tokens == tally.trained + tally.masked + tally.dropped_tokens.total()
    for name, arrays in zip(("ids", "weights", "bad"), zip(*kept, strict=True), strict=True):
        np.save(folder / f"{name}.npy", np.concatenate(arrays))
    np.save(folder / "offsets.npy", np.cumsum([0] + [len(ids) for ids, _, _ in kept], dtype=np.int64))
    summary = {
        "path": where,
        "conversations": tally.conversations,
        "records": len(kept),
        "tokens": tally.tokens,
        "trained": tally.trained,
        "masked": tally.masked,
        "dropped_tokens": dict(tally.dropped_tokens),
        "dropped_or_cut_conversations": dict(tally.dropped_conversations),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def read_dataset(folder: Path, digest: str) -> TokenDataset:
    """Open the files of a data set; the big arrays stay on disk until they are touched."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "weights", "bad")}
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return TokenDataset(
        **arrays,
        offsets=np.load(folder / "offsets.npy"),
        record_ids=[record["id"] for record in records],
        sources=[record["source"] for record in records],
        summary=json.loads((folder / "summary.json").read_text()),
        digest=digest,
    )


def _kept_length(item: Encoded, row_length: int, too_long: TooLong) -> int:
    """Return how many leading ids stay: all, the first row_length + 1, or none if no trained token would be left."""
    if len(item.ids) <= row_length + 1:
        return len(item.ids)
    if too_long == TooLong.DROP or not item.weights[: row_length + 1].any():
        return 0
    return row_length + 1


def _losses(
    item: Encoded | Rejected, row_length: int, too_long: TooLong
) -> Iterator[tuple[Conversation, str, str, int]]:
    if isinstance(item, Rejected):
        yield item.conversation, item.reason, item.detail, 0
    elif lost := len(item.ids) - _kept_length(item, row_length, too_long):
        reason = "too_long" if lost == len(item.ids) else "cut"
        yield item.conversation, reason, f"{len(item.ids)} tokens, a row holds {row_length + 1}", lost
