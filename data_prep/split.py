"""Seeded choices that depend on nothing but the seed and a key: the split, the limits and the shuffle.

A hash instead of a random generator: the choice for one conversation stays the same whatever other sources, rows or
Python versions are around it.
"""

import hashlib
import unicodedata
from collections.abc import Container, Iterable, Mapping

from easylm_like.data.conversation import Conversation, Role


def seeded_fraction(seed: int, purpose: str, key: str) -> float:
    """Return a number in [0, 1), spread evenly over the keys; other purposes give independent numbers."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def prompt_key(conversation: Conversation) -> str:
    """Return the first user message (or first message) in NFKC, without case and with single spaces."""
    asked = next((m for m in conversation.messages if m.role == Role.USER), conversation.messages[0])
    return " ".join(unicodedata.normalize("NFKC", asked.content).casefold().split())


def split_heldout(
    conversations: Iterable[Conversation], own: Container[str], fractions: Mapping[str, float], seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Return (train, heldout): held out are the ids in `own` and the source's fraction of the prompts."""
    train: list[Conversation] = []
    heldout: list[Conversation] = []
    for conversation in conversations:
        chosen = seeded_fraction(seed, "split", prompt_key(conversation)) < fractions[conversation.source]
        (heldout if chosen or conversation.id in own else train).append(conversation)
    return train, heldout


def shuffle(conversations: Iterable[Conversation], seed: int) -> list[Conversation]:
    """Return the conversations in an order that depends on the seed and their ids alone."""
    return sorted(conversations, key=lambda c: (seeded_fraction(seed, "shuffle", c.id), c.id))
