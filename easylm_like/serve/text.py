"""Token ids -> text, piece by piece, with stop strings that may lie across the borders of tokens."""

from collections.abc import Sequence
from functools import lru_cache

import tokenizers
from tokenizers.decoders import DecodeStream

from easylm_like.data.tokenizer import Tokenizer

BEFORE = 16  # tokens of the prompt that decoding looks at: SentencePiece strips the space of a text's first token


class TextStream:
    """Turns the ids of one answer into text as they come.

    A half character waits for its rest; what could be the beginning of a stop string waits until it is none. Special
    tokens have no text. `stopped` says that a stop string came; nothing after it is given.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = (), gap: str = "") -> None:
        self.tokenizer, self.stops, self.gap = tokenizer, [stop for stop in stops if stop], gap
        self.stopped = False
        self._before = list(prompt[-BEFORE:])
        self._stream = DecodeStream(ids=self._before, skip_special_tokens=True)
        self._ids: list[int] = []  # since the last whole character
        self._held = ""

    def push(self, token: int) -> str:
        """Return the text that is certain now that `token` came."""
        self._ids.append(token)
        text = self._stream.step(self.tokenizer.backend, token)
        if text is not None:
            self._ids.clear()
        return self._release(text or "")

    def finish(self) -> str:
        """Return what was held back: nothing comes any more."""
        rest = self.tokenizer.decode(self._ids, skip_special_tokens=True) if self._ids else ""
        text = self._release(rest)
        if self.gap:  # less than the gap came
            self.gap = ""
            text = self._release("")
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        if self.gap:
            if len(self._held) < len(self.gap) and self.gap.startswith(self._held):
                return ""
            self._held, self.gap = self._held.removeprefix(self.gap), ""
        ends = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._held[: min(ends)]
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        certain = len(self._held) - keep
        text, self._held = self._held[:certain], self._held[certain:]
        return text


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Return the bytes that a token stands for inside a text; a special token's are those of its name."""
    piece = tokenizer.backend.id_to_token(token)
    if piece is None:  # a row of the model's vocabulary that the tokenizer has no token for
        return b""
    if token in _added(tokenizer.backend):
        return piece.encode()
    if _byte_level(tokenizer.backend):
        return bytes(_BYTES[character] for character in piece if character in _BYTES)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@lru_cache(maxsize=16)
def _added(backend: tokenizers.Tokenizer) -> frozenset[int]:
    return frozenset(backend.get_added_tokens_decoder())


@lru_cache(maxsize=16)
def _byte_level(backend: tokenizers.Tokenizer) -> bool:
    return '"ByteLevel"' in backend.decoder.__getstate__().decode() if backend.decoder is not None else False


def _byte_characters() -> dict[str, int]:
    """Return GPT-2's table (encoder.py: bytes_to_unicode): printable bytes are themselves, the others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(plain)))}


_BYTES = _byte_characters()
