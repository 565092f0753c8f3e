"""The vocabulary that a GGUF file gets: what gguf_tokenizer.py reads, made of this library's tokenizers.

Source of the rows and keys: llama.cpp's convert_hf_to_gguf.py, `_create_vocab_sentencepiece` and `get_vocab_base`.
"""

import json
from collections.abc import Sequence

import sentencepiece

from easylm_like.convert.gguf.tokenizer import CUTS, PREFIX, Json, Token
from easylm_like.convert.pieces import Piece
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError

NOT_FROM_SCORES = (
    "the tokenizer.json was not made from a SentencePiece model, a GGUF file cannot hold its merges: put the model's "
    "tokenizer.model beside it"
)


def tokenizer_to_metadata(tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> dict[str, object]:
    """Return what a GGUF file says of a tokenizer; a vocabulary with more rows is filled with tokens of type UNUSED.

    SentencePiece's kind puts a space before the text after every special token, in llama.cpp as in this library's
    tokenizers; a tokenizer.json that does so at the beginning only (transformers' `legacy` false) is not expressed.

    Raises:
        UserError: it is of a kind that llama.cpp has no code for, or has more tokens than the model has rows.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size} rows; give its own")
    fields = json.loads(tokenizer.files["tokenizer.json"])
    model = fields["model"]
    if model["type"] != "BPE":
        raise UserError(f"a GGUF file of this family has a tokenizer of type BPE, this one is {model['type']}")
    if model["byte_fallback"]:
        tokens, told = _pieces(tokenizer, fields), {"model": "llama", "pre": "default", "add_space_prefix": True}
    else:
        tokens, told = _byte_level_tokens(fields), {"model": "gpt2", "pre": _cut_name(fields)}
    tokens += [Token(f"[PAD{i}]", Piece.UNUSED, -10000.0) for i in range(len(tokens), vocab_size)]
    told |= {"tokens": [token.text for token in tokens], "token_type": [int(token.type) for token in tokens]}
    if model["byte_fallback"]:
        told["scores"] = [token.score for token in tokens]
    else:
        told["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    told |= _special_ids(tokenizer, stop_ids)
    told |= {"add_bos_token": _adds_bos(fields, tokenizer), "add_eos_token": False}
    return {PREFIX + name: value for name, value in told.items()}


def _pieces(tokenizer: Tokenizer, fields: Json) -> list[Token]:
    """Return the rows of a SentencePiece tokenizer: from its model if that is kept, else from its tokenizer.json."""
    if not _begins_with_space(fields):
        raise UserError("the tokenizer puts no space before a text, as SentencePiece's in a GGUF file must")
    model = tokenizer.files.get("tokenizer.model")
    tokens = _scored(fields) if model is None else _read_pieces(model)
    tokens = _overlay(tokens, fields)
    if model is None:
        _check_scores(tokens, fields)
    return tokens


def _read_pieces(model: bytes) -> list[Token]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    kinds = {
        Piece.UNKNOWN: processor.is_unknown,
        Piece.CONTROL: processor.is_control,
        Piece.UNUSED: processor.is_unused,
        Piece.BYTE: processor.is_byte,
    }

    def kind(i: int) -> Piece:
        return next((kind for kind, is_one in kinds.items() if is_one(i)), Piece.NORMAL)

    return [Token(processor.id_to_piece(i), kind(i), processor.get_score(i)) for i in range(len(processor))]


def _scored(fields: Json) -> list[Token]:
    """Return rows whose scores order the merges as tokenizer.json does: the piece that is merged first has the highest.

    convert_hf_to_gguf.py gives every piece the same score then, and llama.cpp merges from the left.
    """
    model = fields["model"]
    ranks = _ranks(_merges(model))
    rows = []
    for text in sorted(model["vocab"], key=model["vocab"].__getitem__):
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = Piece.BYTE if is_byte else Piece.UNKNOWN if text == model["unk_token"] else Piece.NORMAL
        rows.append(Token(text, kind, 0.0 if kind != Piece.NORMAL else -float(ranks.get(text, len(ranks)))))
    return rows


def _ranks(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Return when each piece is made. SentencePiece makes it by all its pairs at once, as their score is the piece's.

    LLaMA's runs of spaces, all of one score, are the exception: their pairs are mixed.
    """
    places: dict[str, list[int]] = {}
    for place, (first, second) in enumerate(merges):
        places.setdefault(first + second, []).append(place)
    mixed = {text: found[0] for text, found in places.items() if found[-1] - found[0] >= len(found)}
    if scattered := [text for text in mixed if len(set(text)) > 1]:
        raise UserError(f"{NOT_FROM_SCORES}; {scattered[0]!r} is made at several places")
    return {text: min(mixed.values()) if text in mixed else found[0] for text, found in places.items()}


def _check_scores(tokens: list[Token], fields: Json) -> None:
    """Raise UserError unless tokenizer.json has all the merges that SentencePiece would make of these pieces."""
    vocab = fields["model"]["vocab"]
    texts = [token.text for token in tokens if token.type == Piece.NORMAL]
    pairs = ((text[:cut], text[cut:]) for text in texts for cut in range(1, len(text)))
    possible = {(first, second) for first, second in pairs if first in vocab and second in vocab}
    if differing := possible ^ set(_merges(fields["model"])):
        raise UserError(f"{NOT_FROM_SCORES}; it differs in {len(differing)} merges")


def _merges(model: Json) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _byte_level_tokens(fields: Json) -> list[Token]:
    model = fields["model"]
    texts = sorted(model["vocab"], key=model["vocab"].__getitem__)
    rows = [Token(f"[PAD{i}]", Piece.UNUSED) for i in range(max(model["vocab"].values()) + 1)]
    for text in texts:
        rows[model["vocab"][text]] = Token(text, Piece.NORMAL)
    return _overlay(rows, fields)


def _overlay(tokens: list[Token], fields: Json) -> list[Token]:
    """Return the rows with those of tokenizer.json's added tokens in place; what two files tell must agree."""
    rows = dict(enumerate(tokens))
    model, added = fields["model"], fields["added_tokens"]
    trimming = [one["content"] for one in added if one["lstrip"] or one["rstrip"] or one["single_word"]]
    if trimming:
        raise UserError(f"a GGUF file cannot say that a token takes spaces or words around it: {', '.join(trimming)}")
    for one in added:
        kind = Piece.CONTROL if one["special"] else Piece.USER_DEFINED
        old = rows.get(one["id"])
        if old is None or old.type in (Piece.NORMAL, Piece.UNUSED):
            rows[one["id"]] = Token(one["content"], kind, -1000.0)
    wanted = model["vocab"] | {one["content"]: one["id"] for one in added}
    differing = [text for text, i in wanted.items() if i not in rows or rows[i].text != text]
    differing += [row.text for row in rows.values() if row.text not in wanted and row.type != Piece.UNUSED]
    if differing:
        raise UserError(
            f"tokenizer.json and tokenizer.model differ in {len(differing)} tokens, {differing[0]!r} among them; "
            "keep the two files of one model together"
        )
    filler = ((i, Token(f"[PAD{i}]", Piece.UNUSED, -10000.0)) for i in range(max(rows)))
    rows = dict(filler) | rows
    return [rows[i] for i in range(len(rows))]


def _begins_with_space(fields: Json) -> bool:
    steps = [*_steps(fields["normalizer"], "normalizers"), *_steps(fields["pre_tokenizer"], "pretokenizers")]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _cut_name(fields: Json) -> str:
    """Return llama.cpp's name of how this tokenizer.json cuts text."""
    model = fields["model"]
    own = (_plain(fields["pre_tokenizer"]), _plain(fields["normalizer"]), bool(model.get("ignore_merges")))
    for name, cut in CUTS.items():
        if own == (_plain(cut.pre_tokenizer), _plain(cut.normalizer), cut.ignore_merges):
            return name
    raise UserError(
        f"the tokenizer cuts text in a way that llama.cpp has no name for here; known are {', '.join(CUTS)}. It has "
        f"{json.dumps(fields['pre_tokenizer'])[:300]}"
    )


def _plain(step: object) -> object:
    """Return a step of tokenizer.json without what does not change ids."""
    if isinstance(step, dict):
        return {name: _plain(value) for name, value in step.items() if name != "trim_offsets"}
    return [_plain(one) for one in step] if isinstance(step, list) else step


def _steps(step: object, inner: str) -> list[Json]:
    if not isinstance(step, dict):
        return []
    return step[inner] if step["type"] == "Sequence" else [step]


def _adds_bos(fields: Json, tokenizer: Tokenizer) -> bool:
    templates = [one for one in _steps(fields["post_processor"], "processors") if one["type"] == "TemplateProcessing"]
    first = [one["single"][0] for one in templates if isinstance(one["single"], list) and one["single"]]
    return any(one.get("SpecialToken", {}).get("id") == tokenizer.special.bos for one in first if "SpecialToken" in one)


def _special_ids(tokenizer: Tokenizer, stop_ids: Sequence[int]) -> dict[str, object]:
    others = [one for one in dict.fromkeys(stop_ids) if one != tokenizer.eos_id]
    if len(others) > 2:
        raise UserError(f"a GGUF file has room for two ids that end an answer beside EOS, the model has {others}")
    config = json.loads(tokenizer.files["tokenizer_config.json"])
    unknown = config.get("unk_token")
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "unknown": None if unknown is None else tokenizer.backend.token_to_id(unknown),
        **dict(zip(("eot", "eom"), others, strict=False)),
    }
    return {f"{name}_token_id": index for name, index in ids.items() if index is not None}
