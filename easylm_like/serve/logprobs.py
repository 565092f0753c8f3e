"""Log-probabilities as OpenAI's two interfaces write them: objects for chats, parallel lists for completions."""

import codecs
from collections.abc import Sequence

from easylm_like.data.tokenizer import Tokenizer
from easylm_like.serve.failures import Json
from easylm_like.serve.request import TokenLogprob
from easylm_like.serve.text import token_bytes

LOWEST = -9999.0  # what OpenAI writes for what has no probability, since JSON has no infinity


def token_text(content: bytes) -> str:
    r"""Return how a token is shown: its text, or `bytes:\xe2\x96` where it is a part of a character."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join([f"\\x{byte:02x}" for byte in content])


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> Json:
    """Return the `logprobs` of a chat's choice."""
    content = [
        {**_shown(tokenizer, entry.id, entry.logprob), "top_logprobs": [_shown(tokenizer, *one) for one in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], entries: Sequence[TokenLogprob | None], offsets: Sequence[int]
) -> Json:
    """Return the `logprobs` of a completion's choice; an entry of None (the first token's) becomes null.

    The alternatives at a place are by their text, the chosen token always among them. Of two tokens with one text the
    likelier counts.
    """
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        if entry is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for id_, logprob in (*entry.top, (entry.id, entry.logprob)):
            top.setdefault(token_text(token_bytes(tokenizer, id_)), max(logprob, LOWEST))
        tops.append(top)
    return {
        "tokens": [token_text(token_bytes(tokenizer, id_)) for id_ in ids],
        "token_logprobs": [None if entry is None else max(entry.logprob, LOWEST) for entry in entries],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def prompt_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Return where in a prompt's text each of its tokens begins.

    Special tokens that the text does not show, and the dummy space that SentencePiece puts before it, have no length.
    """
    decoder, offsets, at = codecs.getincrementaldecoder("utf-8")("replace"), [], 0
    for id_ in ids:
        offsets.append(at)
        piece = decoder.decode(token_bytes(tokenizer, id_))
        for shown in (piece, piece.removeprefix(" ")):
            if shown and text.startswith(shown, at):
                at += len(shown)
                break
    return offsets


class AnswerOffsets:
    """Where in the text each token of a growing answer begins; `at` is where the next one does."""

    def __init__(self, at: int) -> None:
        self.at = at
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
        """Return the offsets of the answer's next tokens."""
        offsets = []
        for id_ in ids:
            offsets.append(self.at)
            self.at += len(self._decoder.decode(token_bytes(tokenizer, id_)))
        return offsets


def _shown(tokenizer: Tokenizer, id_: int, logprob: float) -> Json:
    content = token_bytes(tokenizer, id_)
    return {"token": token_text(content), "logprob": max(logprob, LOWEST), "bytes": list(content)}
