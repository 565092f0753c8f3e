"""The account of a build: what every step took in, gave out and rejected, per source, and why."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from easylm_like.data.conversation import Conversation

from .record import Record, Reject


@dataclass(slots=True)
class Entry:
    """One step's counts for one source; `notes` counts what was changed in conversations that stay."""

    step: str
    source: str
    entered: int
    left: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, object]:
        """Return the entry for the manifest; reasons and notes are left out where there are none."""
        counts = {"rejected": dict(self.rejected), "notes": dict(self.notes)}
        return {"step": self.step, "source": self.source, "in": self.entered, "out": self.left} | {
            key: value for key, value in counts.items() if value
        }


@dataclass(slots=True)
class Ledger:
    """Every entry and every Reject so far, in order."""

    entries: list[Entry] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    def read(self, name: str, records: Iterable[Record]) -> list[Conversation]:
        """Book what readers found, with what they changed, and return the conversations."""
        found = list(records)
        already = len(self.entries)
        kept = self.step(name, found, found)
        new = {entry.source: entry for entry in self.entries[already:]}
        for conversation in kept:
            new[conversation.source].notes.update(_notes(conversation))
        return kept

    def step(self, name: str, entered: Iterable[Record], records: Iterable[Record]) -> list[Conversation]:
        """Book a step that made `records` of `entered` and return the conversations that are left."""
        entries = {s: Entry(name, s, n) for s, n in Counter(record.source for record in entered).items()}
        kept = []
        for record in records:
            if isinstance(record, Reject):
                entries[record.source].rejected[record.reason] += 1
                self.rejects.append(record)
            else:
                entries[record.source].left += 1
                kept.append(record)
        for entry in entries.values():
            assert entry.entered == entry.left + entry.rejected.total(), entry
        self.entries += entries.values()
        return kept


def _notes(conversation: Conversation) -> list[str]:
    notes = conversation.meta.get("notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []
