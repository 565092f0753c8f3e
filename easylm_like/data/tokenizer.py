"""The tokenizer that trains is the tokenizer that serves: one tokenizer.json, hashed, copied into every output.

Reads a Hugging Face folder (tokenizer.json), or a SentencePiece `tokenizer.model`, for which it builds the
tokenizer.json itself: the BPE merges are rebuilt from the pieces' scores and every stretch of text between special
tokens gets SentencePiece's dummy space, so that ids equal SentencePiece's own (tests compare them on real dialogues).
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from easylm_like.data.template import SpecialTokens
from easylm_like.errors import UserError


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text -> ids with character offsets. `files` are the files to keep beside a model, by name."""

    special: SpecialTokens
    backend: tokenizers.Tokenizer = field(repr=False)
    files: dict[str, bytes] = field(repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special and added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int | None:
        """The id that begins a record, if the tokenizer has one."""
        return None if self.special.bos is None else self.backend.token_to_id(self.special.bos)

    @property
    def eos_id(self) -> int:
        """The id that ends an answer."""
        eos = self.backend.token_to_id(self.special.eos)
        assert eos is not None, self.special.eos  # load_tokenizer checks it
        return eos

    @property
    def digest(self) -> str:
        """SHA-256 of tokenizer.json and of which tokens begin and end: with one digest, two give the same records."""
        ends = json.dumps([self.special.bos, self.special.eos]).encode()
        return hashlib.sha256(self.files["tokenizer.json"] + ends).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each text (ids int32 [T], offsets int32 [T, 2] in characters); adds no special tokens."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(-1, 2)) for e in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into `folder`."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a folder with tokenizer.json or tokenizer.model, or a SentencePiece model file.

    Raises:
        UserError: nothing readable there, or the folder does not say which token ends an answer.
    """
    path = Path(path)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return _load_folder(path)
    model = path / "tokenizer.model" if path.is_dir() else path
    if not model.is_file():
        raise UserError(f"{path}: no tokenizer.json or tokenizer.model there")
    return tokenizer_from_sentencepiece(model.read_bytes(), str(model))


def tokenizer_from_sentencepiece(model: bytes, where: str = "tokenizer.model") -> Tokenizer:
    """Build the tokenizer.json of a SentencePiece BPE model (LLaMA 1 and 2, or `train_sentencepiece`'s)."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"{where}: not a SentencePiece model ({error})") from error
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise UserError(f"{where}: has no tokens for the beginning and the end of a text; answers could not end")
    backend = _backend_from_pieces(processor)
    special = SpecialTokens(
        processor.id_to_piece(processor.bos_id()), processor.id_to_piece(processor.eos_id()), _reserved(backend)
    )
    files = {
        "tokenizer.json": backend.to_str(pretty=False).encode(),
        "tokenizer_config.json": _config(special, processor.id_to_piece(processor.unk_id())),
        "tokenizer.model": model,
    }
    return Tokenizer(special, backend, files)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a BPE tokenizer with LLaMA's settings: bytes as fallback, digits split, no normalisation of the text.

    Raises:
        UserError: the texts are too few or too plain for `vocab_size` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.9995,
            num_threads=1,  # the result must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"cannot train a tokenizer of {vocab_size} pieces on this text: {error}") from error
    return tokenizer_from_sentencepiece(model.getvalue())


def _load_folder(folder: Path) -> Tokenizer:
    content = _match_special_tokens_verbatim((folder / "tokenizer.json").read_bytes())
    try:
        backend = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{folder}/tokenizer.json: not readable as a tokenizer ({error})") from error
    config = _read_json(folder / "tokenizer_config.json")
    bos, eos = _token_text(config.get("bos_token")), _token_text(config.get("eos_token"))
    if eos is None or backend.token_to_id(eos) is None:
        raise UserError(
            f"{folder}/tokenizer_config.json: no eos_token that tokenizer.json knows; answers could not end"
        )
    if bos is not None and backend.token_to_id(bos) is None:
        raise UserError(f"{folder}/tokenizer_config.json: tokenizer.json does not know the bos_token {bos!r}")
    special = SpecialTokens(bos, eos, _reserved(backend))
    files = {"tokenizer.json": content, "tokenizer_config.json": _config(special, _token_text(config.get("unk_token")))}
    if (folder / "tokenizer.model").is_file():
        files["tokenizer.model"] = (folder / "tokenizer.model").read_bytes()
    return Tokenizer(special, backend, files)


def _config(special: SpecialTokens, unk: str | None) -> bytes:
    """Return a tokenizer_config.json that makes transformers use tokenizer.json as it is.

    A `tokenizer_class` of LlamaTokenizer lets transformers 5 build another pipeline from the vocabulary, and
    `added_tokens_decoder` overrides tokenizer.json's own flags; both change ids, so neither is kept.
    """
    tokens = {"bos_token": special.bos, "eos_token": special.eos, "unk_token": unk}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in tokens.items() if token is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    return json.dumps(config, indent=2).encode()


def _match_special_tokens_verbatim(tokenizer_json: bytes) -> bytes:
    """Clear `normalized` on special tokens, else a `</s>` after a word is split into `</`, `s`, `>` and no EOS is seen.

    LLaMA folders of 2023 carry the flag; the dummy-space normalizer then turns the token's own text into `▁</s>`.
    """
    try:
        fields = json.loads(tokenizer_json)
        wrong = [token for token in fields["added_tokens"] if token["special"] and token["normalized"]]
    except (ValueError, KeyError, TypeError):
        return tokenizer_json  # not a tokenizer at all: the loader says so
    for token in wrong:
        token["normalized"] = False
    return json.dumps(fields, ensure_ascii=False).encode() if wrong else tokenizer_json


def _backend_from_pieces(processor: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    size = processor.get_piece_size()
    pieces = [processor.id_to_piece(i) for i in range(size)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    ranked = sorted(
        (i for i in range(size) if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))),
        key=lambda i: -processor.get_score(i),
    )
    merges = [
        (pieces[i][:cut], pieces[i][cut:])
        for i in ranked
        for cut in range(1, len(pieces[i]))
        if pieces[i][:cut] in vocab and pieces[i][cut:] in vocab
    ]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token=pieces[processor.unk_id()], fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    control = [pieces[i] for i in range(size) if processor.is_control(i) or processor.is_unknown(i)]
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in control])
    bos = processor.bos_id()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{pieces[bos]} $A",  # plain text gets a BOS, as LLaMA's folders do it
        pair=f"{pieces[bos]} $A {pieces[bos]}:1 $B:1",
        special_tokens=[(pieces[bos], bos)],
    )
    return backend


def _reserved(backend: tokenizers.Tokenizer) -> frozenset[str]:
    return frozenset(token.content for token in backend.get_added_tokens_decoder().values() if token.special)


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a JSON object")
    return fields


def _token_text(token: object) -> str | None:
    """Return the text of a token that older files write as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
