"""Alpaca (Stanford, 52K rows): a JSON array of tasks with answers of text-davinci-003. Licence: CC BY-NC 4.0.

    {"instruction": "Classify the words as verbs or nouns.", "input": "run, tree", "output": "verb: run; noun: tree"}

The user's message is the instruction, followed by the input, if there is one, after one space: that is how Koala
joined them (koala_data_pipeline, process_alpaca_data.py). Nobody judged the answers, so they carry no quality.
"""

from collections.abc import Iterator

from easylm_like.data.conversation import Conversation, Message, Role

from ..record import Record, Row, text_of, text_or_empty
from ..rows import convert_rows


def read_alpaca(path: str, name: str) -> Iterator[Record]:
    """Yield one conversation a row."""
    return convert_rows(path, name, _conversation)


def _conversation(row: Row) -> Iterator[Record]:
    instruction = text_of(row.fields.get("instruction"), "instruction")
    extra = text_or_empty(row.fields.get("input", ""), "input")
    question = Message(Role.USER, f"{instruction} {extra}" if extra else instruction)
    answer = Message(Role.ASSISTANT, text_of(row.fields.get("output"), "output"))
    yield Conversation(row.id, row.source, (question, answer))
