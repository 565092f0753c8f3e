"""Our own Conversation JSONL (easylm_like/data/conversation.py), for sets that were prepared before or written by hand.

    {"id": "ann-1", "source": "ann", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", ...}]}

Contents are taken as they are. A line that breaks the contract stops the build with its file and line: the file is
ours to mend. The licence is the one of whatever it was made from.
"""

import dataclasses
from collections.abc import Iterator

from easylm_like.data.conversation import Role, conversation_from_json

from ..record import Record, Row, Unusable
from ..rows import convert_rows


def read_own(path: str, name: str) -> Iterator[Record]:
    """Yield the conversations with their own ids; another source than `name` is remembered as meta["origin"]."""
    return convert_rows(path, name, _conversation)


def _conversation(row: Row) -> Iterator[Record]:
    found = conversation_from_json(row.fields, row.where)
    if not any(message.role == Role.ASSISTANT and message.weight for message in found.messages):
        raise Unusable("nothing_trained", "no assistant message of weight 1")
    if not all(message.content.strip() for message in found.messages):
        raise Unusable("empty", "a message is empty")
    meta = dict(found.meta) if found.source == row.source else {"origin": found.source, **found.meta}
    yield dataclasses.replace(found, source=row.source, meta=meta)
