"""The tokenizer inside a GGUF file: llama.cpp keeps what decides the ids there, and no tokenizer.json.

Two kinds are in the family: SentencePiece's (`tokenizer.ggml.model` "llama": pieces, scores, types) and byte-level BPE
("gpt2": tokens, merges, and the name of how text is cut before merging, of which llama.cpp has the code and this
module the JSON). Source: llama.cpp's src/llama-vocab.cpp. gguf_vocabulary.py is the other way.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from easylm_like.convert.gguf.names import Metadata
from easylm_like.convert.pieces import Piece, build_sentencepiece
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_sentencepiece
from easylm_like.errors import UserError

PREFIX = "tokenizer.ggml."
ADVICE = "give the model's own with --tokenizer=DIR"
Json = dict[str, Any]  # of a tokenizer.json


@dataclass(frozen=True, slots=True)
class Token:
    """One row of a vocabulary. Byte-level BPE has no scores."""

    text: str
    type: Piece
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Cut:
    """How text is cut before merging, as a published tokenizer.json says it.

    `ignore_merges` takes a piece that is a token as it is. llama.cpp puts a BOS before a text if `add_bos`, where a
    file does not say.
    """

    pre_tokenizer: Json
    normalizer: Json | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _level(*, use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _splits(*patterns: str) -> Json:
    split = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return {"type": "Sequence", "pretokenizers": [*split, _level(use_regex=False)]}


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_DIGITS: Json = {"type": "Digits", "individual_digits": True}
CUTS = {
    "llama-bpe": Cut(_splits(_WORDS + r"\p{N}{1,3}" + _REST), ignore_merges=True, add_bos=True),
    "qwen2": Cut(_splits(_WORDS + r"\p{N}" + _REST), normalizer={"type": "NFC"}),
    "smollm": Cut({"type": "Sequence", "pretokenizers": [_DIGITS, _level(use_regex=True)]}),
    "gpt-2": Cut(_level(use_regex=True)),
    "default": Cut(_splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),  # llama.cpp's own
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def tokenizer_from_metadata(metadata: Metadata, where: str) -> Tokenizer | None:
    """Return the tokenizer of a file, None if it has none; filling tokens at the end of the vocabulary are left out.

    Raises:
        UserError: it is of a kind that is not read here, or is damaged.
    """
    model = metadata.get(f"{PREFIX}model")
    if model in (None, "none", "no_vocab"):
        return None
    if model not in ("llama", "gpt2"):
        raise UserError(f"{where}: the tokenizer is of the kind {model!r}; {ADVICE}")
    tokens = _tokens(metadata, where)
    while tokens and tokens[-1].type == Piece.UNUSED:
        tokens.pop()
    texts = [token.text for token in tokens]
    if len(set(texts)) != len(texts) or not texts:
        raise UserError(f"{where}: damaged: the tokenizer has {len(texts)} tokens, {len(set(texts))} different ones")
    return _from_pieces(tokens, metadata, where) if model == "llama" else _from_merges(tokens, metadata, where)


def _tokens(metadata: Metadata, where: str) -> list[Token]:
    texts = metadata.get(f"{PREFIX}tokens")
    types = metadata.get(f"{PREFIX}token_type")
    if not isinstance(texts, list) or not isinstance(types, list) or len(texts) != len(types):
        raise UserError(f"{where}: the tokenizer lacks its tokens or their types; {ADVICE}")
    scores = metadata.get(f"{PREFIX}scores", [0.0] * len(texts))
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise UserError(f"{where}: damaged: the tokenizer's scores are not as many as its {len(texts)} tokens")
    if strange := sorted(set(types) - {*Piece}):
        raise UserError(f"{where}: damaged: tokens of the unknown types {strange}")
    return [Token(*row) for row in zip(texts, map(Piece, types), scores, strict=True)]


def _special(name: str, tokens: list[Token], metadata: Metadata, default: int | None = None) -> str | None:
    index = metadata.get(f"{PREFIX}{name}_token_id", default)
    return tokens[index].text if isinstance(index, int) and index < len(tokens) else None


def _from_pieces(tokens: list[Token], metadata: Metadata, where: str) -> Tokenizer:
    if metadata.get(f"{PREFIX}add_space_prefix", True) is not True:
        raise UserError(f"{where}: the tokenizer puts no space before a text, which is not computed here; {ADVICE}")
    if any(token.type == Piece.UNUSED for token in tokens):
        raise UserError(f"{where}: the tokenizer has unused tokens between others; {ADVICE}")
    model = build_sentencepiece(
        [(token.text, token.score, token.type) for token in tokens],
        unk=_special("unknown", tokens, metadata, 0) or "<unk>",
        bos=_special("bos", tokens, metadata, 1) or "<s>",
        eos=_special("eos", tokens, metadata, 2) or "</s>",
    )
    tokenizer = tokenizer_from_sentencepiece(model, f"{where}, tokenizer")
    added = [token.text for token in tokens if token.type == Piece.USER_DEFINED]
    tokenizer.backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in added])
    files = tokenizer.files | {"tokenizer.json": tokenizer.backend.to_str().encode()} if added else tokenizer.files
    return Tokenizer(tokenizer.special, tokenizer.backend, files)


def _from_merges(tokens: list[Token], metadata: Metadata, where: str) -> Tokenizer:
    name, merges = metadata.get(f"{PREFIX}pre"), metadata.get(f"{PREFIX}merges")
    cut = CUTS.get(ALIASES.get(str(name), str(name)))
    if cut is None:
        raise UserError(f"{where}: tokenizer.ggml.pre is {name!r}, this library knows {', '.join(CUTS)}; {ADVICE}")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise UserError(f"{where}: the tokenizer lacks its merges; {ADVICE}")
    bos, eos, unk = (_special(kind, tokens, metadata) for kind in ("bos", "eos", "unknown"))
    if eos is None:
        raise UserError(f"{where}: {PREFIX}eos_token_id names no token, so that answers could not end; {ADVICE}")
    begins = bos is not None and metadata.get(f"{PREFIX}add_bos_token", cut.add_bos) is True
    vocab = {token.text: i for i, token in enumerate(tokens)}
    special = {Piece.CONTROL: True, Piece.UNKNOWN: True, Piece.USER_DEFINED: False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    fields = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token.text, "special": special[token.type]} | flags
            for i, token in enumerate(tokens)
            if token.type in special
        ],
        "normalizer": cut.normalizer,
        "pre_tokenizer": cut.pre_tokenizer,
        "post_processor": _begin_with(bos, vocab[bos]) if begins and bos is not None else None,
        "decoder": _level(use_regex=True),
        "model": {
            "type": "BPE",
            "ignore_merges": cut.ignore_merges,
            "vocab": vocab,
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
    named = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
    return _load(fields, {kind: text for kind, text in named.items() if text is not None}, where)


def _load(fields: Json, config: Json, where: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(fields, ensure_ascii=False), "utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), "utf-8")
        try:
            return load_tokenizer(folder)
        except UserError as error:
            raise UserError(f"{where}: the tokenizer inside is damaged: {error}") from error


def _begin_with(bos: str, index: int) -> Json:
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second, other = {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second, other],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
