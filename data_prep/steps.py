"""What happens between reading and writing: a step yields every conversation again, or a Reject in its place."""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping

from easylm_like.data.conversation import Conversation, Message, Quality, conversation_to_json

from .config import Feedback
from .record import Record, Reject
from .split import prompt_key, seeded_fraction


def keep_feedback(conversations: Iterable[Conversation], feedback: Feedback) -> Iterator[Record]:
    """Take out conversations that train a bad answer if the feedback is positive; bad answers in their context stay."""
    for conversation in conversations:
        if feedback == Feedback.POSITIVE and Quality.BAD in trained_qualities(conversation):
            yield _reject(conversation, "bad_answer", "the mixture takes positive feedback only")
        else:
            yield conversation


def drop_duplicates(conversations: Iterable[Conversation]) -> Iterator[Record]:
    """Take out conversations whose messages (text, quality and weight) equal those of an earlier one."""
    seen: dict[tuple[Message, ...], str] = {}
    for conversation in conversations:
        first = seen.setdefault(conversation.messages, conversation.id)
        if first != conversation.id:
            yield _reject(conversation, "duplicate", f"same messages as {first}")
        else:
            yield conversation


def limit_sources(
    conversations: list[Conversation], limits: Mapping[str, int], heldout: Container[str], seed: int
) -> Iterator[Record]:
    """Keep whole groups of a source, in seeded order, while its limit holds; the ids in `heldout` are not limited."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for c in conversations:
        if limits[c.source] and c.id not in heldout:
            groups[c.source, c.group or c.id].append(c.id)
    left = dict(limits)
    over: set[str] = set()
    for (source, _), ids in sorted(groups.items(), key=lambda item: seeded_fraction(seed, "limit", item[0][1])):
        left[source] -= len(ids)
        if left[source] < 0:
            over.update(ids)
    for c in conversations:
        # The row itself is in the input file and nothing is wrong with it, so it is not copied into the rejects.
        yield Reject(c.source, c.id, "over_limit", f"limit {limits[c.source]}") if c.id in over else c


def drop_heldout_prompts(train: Iterable[Conversation], heldout: Iterable[Conversation]) -> Iterator[Record]:
    """Take out of `train` what has the prompt of a held-out conversation."""
    prompts = {prompt_key(conversation): conversation.id for conversation in heldout}
    for conversation in train:
        if (held := prompts.get(prompt_key(conversation))) is not None:
            yield _reject(conversation, "prompt_in_heldout", f"its first user message is that of {held}, held out")
        else:
            yield conversation


def trained_qualities(conversation: Conversation) -> set[Quality | None]:
    """Return the qualities of the answers that are trained."""
    return {m.quality for m in conversation.messages if m.role == "assistant" and m.weight}


def _reject(conversation: Conversation, reason: str, detail: str) -> Reject:
    return Reject(conversation.source, conversation.id, reason, detail, conversation_to_json(conversation))
