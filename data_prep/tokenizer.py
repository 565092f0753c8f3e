"""Train a SentencePiece tokenizer on conversations as a template renders them, for models trained from scratch."""

from collections.abc import Iterator
from pathlib import Path

from easylm_like.atomic import atomic_folder
from easylm_like.data.conversation import read_conversations
from easylm_like.data.template import RenderError, SpecialTokens, Template
from easylm_like.data.tokenizer import train_sentencepiece

_END = "\0"  # stands for the end of an answer, which is a piece of its own and no text to learn from


def write_tokenizer(data: Path, template: Template, vocab_size: int, out: Path) -> None:
    """Write the tokenizer's folder; the same file gives the same bytes.

    Raises:
        UserError: the file cannot be read or is too little text for `vocab_size` pieces.
    """
    tokenizer = train_sentencepiece(_lines(data, template), vocab_size)
    with atomic_folder(out, mark="tokenizer.json") as folder:
        tokenizer.save(folder)


def _lines(data: Path, template: Template) -> Iterator[str]:
    """Yield the rendered text by lines, without ends of answers; what cannot be rendered is not trained on either."""
    special = SpecialTokens(bos=None, eos=_END)
    for conversation in read_conversations(data):
        try:
            spans = template.spans(conversation.messages, special)
        except RenderError:
            continue
        text = "".join(span.text for span in spans).replace(_END, "\n")
        yield from filter(None, text.split("\n"))
