"""SentencePiece models rebuilt from the pieces that other formats keep of them."""

from collections.abc import Iterable
from enum import IntEnum
from typing import Any


class Piece(IntEnum):
    """What a piece is (sentencepiece_model.proto, SentencePiece.Type; GGUF has the same numbers)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def build_sentencepiece(
    pieces: Iterable[tuple[str, float, Piece]], *, unk: str = "<unk>", bos: str = "<s>", eos: str = "</s>"
) -> bytes:
    """Return the tokenizer.model of a BPE with LLaMA's settings: a space in front, none removed, bytes as fallback."""
    from sentencepiece import sentencepiece_model_pb2

    protocol: Any = sentencepiece_model_pb2  # its classes are made at import, where no type checker sees them
    model = protocol.ModelProto()
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=int(kind))
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = protocol.TrainerSpec.BPE, len(model.pieces)
    trainer.byte_fallback = trainer.split_digits = trainer.allow_whitespace_only_pieces = True
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = unk, bos, eos
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", True, False
    return bytes(model.SerializeToString())
